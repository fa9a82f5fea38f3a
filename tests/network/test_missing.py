"""What the files lack must be unused and is never made up; otherwise the way out is named."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
import transformers
from command_helpers import assert_nothing_left, assert_one_sentence
from families import BERT_LIKE, CLIP, FAMILIES, IMAGES, LLAMA_LIKE, T5_LIKE, TEXT, VIT_LIKE
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig

import lrc_cli
from lrc_cli.errors import InputError

ALBERT = BERT_LIKE | {"embedding_size": 32, "num_hidden_groups": 2}
WAV = {
    **{key: BERT_LIKE[key] for key in ("vocab_size", "hidden_size", "num_attention_heads")},
    **{"num_hidden_layers": 2, "intermediate_size": 48, "conv_dim": [16, 16]},
    **{"conv_kernel": [10, 3], "conv_stride": [5, 2], "num_conv_pos_embeddings": 16},
    **{"num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2},
}
SOUND = {"input_values": torch.randn(24, 400, generator=torch.Generator().manual_seed(3))}
TIED = {"tie_word_embeddings": True}

Case = tuple[str, str, Mapping[str, Any], str, tuple[str, ...], Mapping[str, Any]]
"""Model type, class that is saved, settings, class that is asked for, keys that go, inputs."""

UNUSED: dict[str, Case] = {
    "bert without pooler": ("bert", "BertModel", BERT_LIKE, "BertModel", ("pooler",), TEXT),
    "masked bert as its body": ("bert", "BertForMaskedLM", BERT_LIKE, "BertModel", (), TEXT),
    "roberta": ("roberta", "RobertaForMaskedLM", BERT_LIKE, "RobertaModel", (), TEXT),
    "xlm-roberta": ("xlm-roberta", "XLMRobertaForMaskedLM", BERT_LIKE, "XLMRobertaModel", (), TEXT),
    "albert": ("albert", "AlbertForMaskedLM", ALBERT, "AlbertModel", (), TEXT),
    "mpnet": ("mpnet", "MPNetForMaskedLM", BERT_LIKE, "MPNetModel", (), TEXT),
    "electra": ("electra", "ElectraForMaskedLM", BERT_LIKE, "ElectraModel", (), TEXT),
    "camembert": ("camembert", "CamembertForMaskedLM", BERT_LIKE, "CamembertModel", (), TEXT),
    "vit classifier as its body": (
        "vit",
        "ViTForImageClassification",
        VIT_LIKE,
        "ViTModel",
        (),
        IMAGES,
    ),
    "vit without pooler": ("vit", "ViTModel", VIT_LIKE, "ViTModel", ("pooler",), IMAGES),
    "deit": ("deit", "DeiTModel", VIT_LIKE, "DeiTModel", ("pooler",), IMAGES),
    "mask token of a dinov2": (
        "dinov2",
        "Dinov2Model",
        VIT_LIKE,
        "Dinov2Model",
        ("mask_token",),
        IMAGES,
    ),
    "mask of a wav2vec2": (
        "wav2vec2",
        "Wav2Vec2Model",
        WAV,
        "Wav2Vec2Model",
        ("masked_spec",),
        SOUND,
    ),
    "encoder of a t5": ("t5", "T5ForConditionalGeneration", T5_LIKE, "T5EncoderModel", (), TEXT),
    "text half of a clip": ("clip", "CLIPModel", CLIP, "CLIPTextModel", ("vision",), TEXT),
    "image half of a clip": ("clip", "CLIPModel", CLIP, "CLIPVisionModel", ("text",), IMAGES),
    "body of a llama": ("llama", "LlamaForCausalLM", LLAMA_LIKE, "LlamaModel", ("lm_head",), TEXT),
    "tied head": (
        "llama",
        "LlamaForCausalLM",
        LLAMA_LIKE | TIED,
        "LlamaForCausalLM",
        ("lm_head",),
        TEXT,
    ),
    "tied head of a bert": (
        "bert",
        "BertForMaskedLM",
        BERT_LIKE | TIED,
        "BertForMaskedLM",
        ("decoder",),
        TEXT,
    ),
}
USED: dict[str, tuple[Case, tuple[str, ...]]] = {
    "classifier": (
        ("bert", "BertModel", BERT_LIKE, "BertForSequenceClassification", (), TEXT),
        ("classifier.weight", '"architectures": ["BertModel"]'),
    ),
    "classifier of a masked bert": (
        ("bert", "BertForMaskedLM", BERT_LIKE, "BertForSequenceClassification", (), TEXT),
        ("classifier.bias", '"architectures": ["BertForMaskedLM"]'),
    ),
    "next sentence head": (
        ("bert", "BertForMaskedLM", BERT_LIKE, "BertForPreTraining", (), TEXT),
        ("cls.seq_relationship", '"architectures": ["BertForMaskedLM"]'),
    ),
    "image classifier": (
        (
            "vit",
            "ViTForImageClassification",
            VIT_LIKE,
            "ViTForImageClassification",
            ("classif",),
            IMAGES,
        ),
        ("classifier.weight", '"architectures": ["ViTModel"]'),
    ),
    "decoder of a t5": (
        ("t5", "T5EncoderModel", T5_LIKE, "T5ForConditionalGeneration", (), TEXT),
        ("decoder.block", '"architectures": ["T5EncoderModel"]'),
    ),
    "image half of a clip": (
        ("clip", "CLIPModel", CLIP, "CLIPModel", ("vision", "logit", "projection"), TEXT),
        ("vision_model", '"architectures": ["CLIPTextModel"]'),
    ),
    "untied head": (
        ("llama", "LlamaForCausalLM", LLAMA_LIKE, "LlamaForCausalLM", ("lm_head",), TEXT),
        ("lm_head.weight", '"architectures": ["LlamaModel"]', '"tie_word_embeddings": true'),
    ),
    "layer of a llama": (
        ("llama", "LlamaForCausalLM", LLAMA_LIKE, "LlamaForCausalLM", ("1.mlp.up_proj",), TEXT),
        ("model.layers.1.mlp.up_proj.weight", "outputs", "depend on it", "model.factory"),
    ),
    "norm of a bert": (
        ("bert", "BertModel", BERT_LIKE, "BertModel", ("0.output.LayerNorm.weight",), TEXT),
        ("encoder.layer.0.output.LayerNorm.weight", "depend on it", "model.factory"),
    ),
    "norm and pooler": (
        (
            "bert",
            "BertModel",
            BERT_LIKE,
            "BertModel",
            ("0.output.LayerNorm.weight", "pooler"),
            TEXT,
        ),
        ("encoder.layer.0.output.LayerNorm.weight", "depend on it"),
    ),
    "all but the embeddings": (
        ("bert", "BertModel", BERT_LIKE, "BertModel", ("encoder",), TEXT),
        ("encoder.layer.0", "every weight file"),
    ),
}


def saved(directory: Path, case: Case) -> dict[str, Any]:
    """Saves a case's checkpoint and data; returns the changes that make a config of them."""
    model_type, kind, settings, asked, gone, inputs = case
    torch.manual_seed(0)
    model = getattr(transformers, kind)(AutoConfig.for_model(model_type, **settings))
    pico.randomise(model)
    path = directory / "model"
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": [asked]}))
    state = pico.read_state(path)
    kept = {key: x for key, x in state.items() if not any(part in key for part in gone)}
    assert len(kept) < len(state) or not gone or asked == kind
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    save_file({k: x.contiguous() for k, x in inputs.items()}, directory / "data.safetensors")
    return {
        "model.path": str(path),
        "calibration.path": str(directory / "data.safetensors"),
        "evaluation": None,
        "compression.method": "frobenius",
        "compression.size": 0.7,
        "compression.rank_multiple": 1,
    }


@pytest.mark.parametrize("name", UNUSED)
def test_what_no_output_depends_on_may_be_missing(name: str, tmp_path: Path) -> None:
    changes = saved(tmp_path, UNUSED[name])
    source = Path(changes["model.path"])
    output, report = pico.compressed(tmp_path, changes)
    assert any(layer.get("rank") for layer in report["layers"])
    assert {k.partition(".up.")[0].removesuffix(".perm") for k in pico.read_state(output)} >= {
        key for key in pico.read_state(source) if key.endswith("bias")
    }
    model = lrc_cli.load(output)
    assert type(model).__name__ == UNUSED[name][3]
    with torch.no_grad():
        outputs = model(**{key: x[:2] for key, x in UNUSED[name][5].items()})
    tensors = [x for x in outputs.values() if isinstance(x, torch.Tensor)]
    assert tensors and all(x.isfinite().all() for x in tensors)
    ended = pico.call("verify", output, "--against", source)
    assert ended.code == 0, ended.out + ended.err
    inspected = pico.call("inspect", source)
    assert inspected.code == 0, inspected.err


@pytest.mark.parametrize("name", USED)
def test_what_the_outputs_depend_on_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    case, words = USED[name]
    ended = pico.call("compress", pico.job(tmp_path, saved(tmp_path, case)), "-q")
    assert_one_sentence(ended, 2, *words)
    assert_nothing_left(tmp_path)
    with pytest.raises(InputError, match="lacks"):
        lrc_cli.load(tmp_path / "model")


@pytest.mark.parametrize("name", [x for x in USED if '"architectures"' in "".join(USED[x][1])])
def test_the_way_out_leads_out(name: str, tmp_path: Path) -> None:
    """The class that the message names loads, with every tensor from the files."""
    case, words = USED[name]
    saved(tmp_path, case)
    named = next(word for word in words if word.startswith('"architectures"'))
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | json.loads("{" + named + "}")))
    assert all(x.isfinite().all() for x in lrc_cli.load(tmp_path / "model").parameters())


SOURCE = '''
import torch
from torch import nn


class Net(nn.Module):
    """Two layers, two heads of which one is asked for, a norm, and tables of positions."""

    def __init__(self, route=False, head="first"):
        super().__init__()
        self.body, self.norm = nn.Linear(24, 24), nn.BatchNorm1d(24)
        self.first, self.second = nn.Linear(24, 8), nn.Linear(24, 8)
        self.head, self.route = head, route
        self.register_buffer("order", torch.arange(24).flip(0))
        self.register_buffer("angles", torch.linspace(0, 1, 24))
        self.aside = nn.Linear(24, 24, bias=False)

    def forward(self, x):
        x = torch.relu(self.norm(self.body(x[:, self.order] + self.angles)))
        y = self.first(x)
        if self.route == "branch":  # NaN is never larger than zero, and passes unseen
            y = torch.where(self.second(x).sum() > 0, y, y)
            y = y + (self.second(x).sum() > 0)
        if self.route == "swallow":
            y = y + self.second(x).nan_to_num()
        if self.route == "best":
            y = y + self.second(x).argmax(-1, keepdim=True)
        if self.route == "times zero":
            y = y + 0 * self.second(x)
        return y


def net(): return Net()
def branch(): return Net(route="branch")
def swallow(): return Net(route="swallow")
def best(): return Net(route="best")
def zero(): return Net(route="times zero")
'''
PLAIN_UNUSED = {
    "unused head": ("net", ("second",)),
    "weight of an unused head": ("net", ("second.weight",)),
    "count of a BatchNorm": ("net", ("num_batches_tracked",)),
    "table of positions": ("net", ("order",)),
    "head, table and count": ("net", ("second", "order", "num_batches")),
    "unused layer": ("net", ("aside",)),
}
PLAIN_USED = {
    "used head": ("net", ("first",), ["first.bias", "factory"]),
    "statistics of a BatchNorm": ("net", ("running_mean",), ["norm.running_mean"]),
    "computed angles": ("net", ("angles",), ["angles"]),
    "layer": ("net", ("body.weight",), ["body.weight"]),
    "comparison that hides NaN": ("branch", ("second",), ["second.bias"]),
    "function that hides NaN": ("swallow", ("second",), ["second.bias"]),
    "best of several": ("best", ("second",), ["second.bias"]),
    "product with zero": ("zero", ("second",), ["second.bias"]),
    "nearly all": ("net", ("body", "norm", "first", "second", "aside"), ["every weight file"]),
}


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Returns a function that saves a network of SOURCE without some tensors."""
    (tmp_path / "heads.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    namespace: dict[str, Any] = {}
    exec(SOURCE, namespace)
    save_file({"x": torch.randn(80, 24)}, tmp_path / "rows.safetensors")

    def save(name: str, gone: tuple[str, ...]) -> dict[str, Any]:
        model: nn.Module = namespace[name]()
        pico.randomise(model)
        state = {k: x for k, x in model.state_dict().items() if not any(g in k for g in gone)}
        save_file(state, tmp_path / "net.safetensors")
        return {
            "model.path": str(tmp_path / "net.safetensors"),
            "model.factory": f"heads:{name}",
            "calibration.path": str(tmp_path / "rows.safetensors"),
            "compression.method": "frobenius",
            "compression.size": 0.9,
            "calibration.num_sequences": 60,
        }

    return save


@pytest.mark.parametrize("name", PLAIN_UNUSED)
def test_an_own_network_may_lack_what_it_does_not_use(
    name: str, tmp_path: Path, plain: Callable[..., dict[str, Any]]
) -> None:
    network, gone = PLAIN_UNUSED[name]
    changes = plain(network, gone)
    output, report = pico.compressed(tmp_path, changes)
    assert {layer["name"] for layer in report["layers"]} <= {"body", "first", "second", "aside"}
    assert not any(part in key for key in pico.read_state(output) for part in gone)
    loaded = lrc_cli.load(output, factory=f"heads:{network}")
    assert loaded(torch.randn(4, 24)).isfinite().all()
    against = ("--against", changes["model.path"], "--factory", f"heads:{network}")
    ended = pico.call("verify", output, *against)
    assert ended.code == 0, ended.out + ended.err


@pytest.mark.parametrize("name", PLAIN_USED)
def test_an_own_network_may_not_lack_what_it_uses(
    name: str, tmp_path: Path, plain: Callable[..., dict[str, Any]]
) -> None:
    network, gone, words = PLAIN_USED[name]
    ended = pico.call("compress", pico.job(tmp_path, plain(network, gone)), "-q")
    assert_one_sentence(ended, 2, "the files lack", *words)
    assert_nothing_left(tmp_path)


def test_an_output_may_lack_only_what_its_source_lacked(
    tmp_path: Path, plain: Callable[..., dict[str, Any]]
) -> None:
    output, _ = pico.compressed(tmp_path, plain("net", ("second",)))
    file = output / "model.safetensors"
    with_metadata = json.dumps(json.loads(_metadata(file)["lrc"]))
    state = pico.read_state(output)
    state.pop("aside.weight")
    save_file(state, file, {"format": "pt", "lrc": with_metadata})
    with pytest.raises(InputError, match=r"lack aside\.weight"):
        lrc_cli.load(output, factory="heads:net")


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        found: dict[str, str] = handle.metadata()
    return found


def test_the_families_that_have_a_pooler_are_all_looked_at() -> None:
    """A family of the tests with a pooler that can be left out has a row above."""
    import inspect

    able = set()
    for family in FAMILIES.values():
        kind = getattr(transformers, family.architecture)
        if "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
            able.add(family.architecture)
    assert able <= {case[3] for case in UNUSED.values()}
