"""These tests check Gram matrices against autograd, and the loss that is chosen."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import media_helpers
import pico
import pytest
import torch
from families import FAMILIES
from moments_helpers import (
    SEED,
    Moments,
    assert_close,
    input_groups,
    measured,
    opened,
    padded_tokens,
)
from pico import Models
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from lrc_cli.data.decoder import told_apart
from lrc_cli.errors import InputError
from lrc_cli.execution.losses import Loss, backward_scalars, choose_loss, prepare
from lrc_cli.execution.network import Network, make_network
from lrc_cli.job.statistics.moments import GramSum
from lrc_cli.job.work import STATISTICS, WorkDirectory
from lrc_cli.network.keys import Keys
from lrc_cli.network.layer import Layer

CPU = torch.device("cpu")


def naive(
    model: nn.Module, layers: list[Layer], inputs: dict[str, Tensor], labels: Tensor
) -> tuple[Moments, Moments]:
    """Returns the same matrices by one float64 forward and backward pass, token by token."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
            output.retain_grad()
            seen[name] = arguments[0], output

        return hook

    handles = [model.get_submodule(x.name).register_forward_hook(watch(x.name)) for x in layers]
    logits = model(**inputs).logits
    total = torch.zeros((), dtype=torch.float64)
    for row, column in (labels != -100).nonzero().tolist():
        total = total - logits[row, column].log_softmax(-1)[labels[row, column]]
    total.backward()
    for handle in handles:
        handle.remove()
    grams, fishers = {}, {}
    tokens = inputs["attention_mask"].nonzero().tolist()
    for name, (x, y) in seen.items():
        assert y.grad is not None
        grams[name] = sum(torch.outer(x[i, t], x[i, t]) for i, t in tokens).detach() / len(tokens)
        fishers[name] = sum(torch.outer(y.grad[i, t], y.grad[i, t]) for i, t in tokens)
        fishers[name] = fishers[name] / len(tokens)
    return grams, fishers


@pytest.mark.parametrize("width", [3, 256, 300, 530])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gram_sum_is_the_mean_of_outer_products(width: int, dtype: torch.dtype) -> None:
    rows = torch.randn(37, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    sums = GramSum(width, CPU)
    for chunk in rows.split(10):
        sums.add(chunk)
    expected = rows.double().T @ rows.double() / 37
    assert sums.num_rows == 37
    assert_close({"x": sums.mean()}, {"x": expected}, 1e-6)


def test_a_gram_sum_does_not_lose_small_chunks() -> None:
    sums = GramSum(1, CPU)
    sums.add(torch.tensor([[2.0**13]]))
    for _ in range(1000):
        sums.add(torch.tensor([[1.0]]))  # 2^26 + 1 is no float32
    assert sums.mean().item() * 1001 == 2**26 + 1000


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_next_token_moments_equal_autograd(batch: int, checkpoint: Models) -> None:
    path, inputs = checkpoint("llama-long"), padded_tokens()
    module, layers = opened(path)
    layers = [layer for layer in layers if layer.unit in ("model.layers.0", "model.layers.11")]
    labels = torch.full_like(inputs["input_ids"], -100)
    for row in range(len(labels)):
        for t in range(int(inputs["attention_mask"][row].sum()) - 1):
            labels[row, t] = inputs["input_ids"][row, t + 1]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    expected = naive(model, layers, inputs, labels)
    network = make_network(module, device=CPU, dtype=torch.float32)
    found = measured(network, layers, inputs, Loss(kind="next_token"), batch)
    assert_close(found[0], expected[0], 1e-4)
    assert_close(found[1], expected[1], 1e-3)


def test_masked_token_moments_equal_autograd(checkpoint: Models) -> None:
    path, inputs = checkpoint("bert-mlm"), padded_tokens(rows=20, length=24)
    module, layers = opened(path)
    loss = Loss(kind="masked_token", mask_token=pico.SPECIAL.index("[MASK]"))
    masked, labels = prepare(loss, inputs, torch.Generator().manual_seed(SEED))
    assert labels is not None
    chosen = labels != -100
    assert 0.08 < chosen[inputs["attention_mask"] == 1].float().mean() < 0.25
    assert not chosen[inputs["attention_mask"] == 0].any()
    assert torch.equal(labels[chosen], inputs["input_ids"][chosen])
    assert (masked["input_ids"][chosen] == pico.SPECIAL.index("[MASK]")).all()
    assert torch.equal(masked["input_ids"][~chosen], inputs["input_ids"][~chosen])
    model = AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float64).eval()
    expected = naive(model, layers, masked, labels)
    network = make_network(module, device=CPU, dtype=torch.float32)
    found = measured(network, layers, inputs, loss, len(inputs["input_ids"]))
    assert_close(found[0], expected[0], 1e-4)
    assert_close(found[1], expected[1], 1e-3)


@pytest.fixture
def two_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Network, list[Layer]]:
    """y = B A x with A (6, 5) and B (4, 6): its curvature is known in closed form."""
    (tmp_path / "pico_two.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Linear(5, 6, bias=False), nn.Linear(6, 4, bias=False))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    generator = torch.Generator().manual_seed(2)
    state = {
        "0.weight": torch.randn(6, 5, generator=generator) / 2,
        "1.weight": torch.randn(4, 6, generator=generator) / 2,
    }
    save_file(state, tmp_path / "model.safetensors")
    module, layers = opened(tmp_path / "model.safetensors", "pico_two:build")
    return make_network(module, device=CPU, dtype=torch.float32), layers


@pytest.mark.parametrize("kind", ["output", "sampled"])
def test_random_probes_and_labels_have_the_expected_curvature(
    kind: str, two_layers: tuple[Network, list[Layer]]
) -> None:
    network, layers = two_layers
    x = torch.randn(20_000, 5, generator=torch.Generator().manual_seed(3))
    _, found = measured(network, layers, {"x": x}, Loss(kind=kind), 4000)
    first, second = (p.double() for p in network.module.parameters())
    if kind == "output":  # 1/2 |f~ - f|^2: the identity at the output
        last = torch.eye(4, dtype=torch.float64)
    else:  # the Fisher matrix of a softmax, diag(p) - p p^T, on average
        p = (x.double() @ first.T @ second.T).softmax(-1)
        last = torch.diag(p.mean(0)) - p.T @ p / len(p)
    expected = {"0": second.T @ last @ second, "1": last}
    assert_close(found, expected, 0.03)
    _, again = measured(network, layers, {"x": x}, Loss(kind=kind), 4000)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_padding_is_left_out_of_plain_modules(
    plain_folder: pico.PlainFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    module, layers = opened(plain_folder.path / "attention.safetensors", "pico_factories:attention")
    inputs = pico.read_state(plain_folder.path / "masked.safetensors")
    network = make_network(module, device=CPU, dtype=torch.float32)
    found, _ = measured(network, layers, inputs, None, 64)
    tokens = inputs["x"][inputs["attention_mask"].bool()].double()
    assert len(tokens) < inputs["attention_mask"].numel()
    assert_close({"query": found["query"]}, {"query": tokens.T @ tokens / len(tokens)})


def test_layers_that_read_one_tensor_are_found(checkpoint: Models) -> None:
    module, layers = opened(checkpoint("llama"))
    network = make_network(module, device=CPU, dtype=torch.float32)
    groups = input_groups(network, layers, {"input_ids": torch.ones(1, 4, dtype=torch.long)})
    for layer in layers:
        stem, _, leaf = layer.name.rpartition(".")
        leader = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(leaf, leaf)
        assert groups[layer.name] == f"{stem}.{leader}"


def test_a_shared_input_is_kept_once(tmp_path: Path, llama_job: dict[str, Any]) -> None:
    pico.compressed(tmp_path, llama_job)
    files = sorted((tmp_path / ".lrc-work").glob("*/statistics/*.safetensors"))
    assert [file.stem for file in files] == ["model.layers.0", "model.layers.1"]
    kept = pico.read_state(files[0])
    grams = {key for key in kept if key.startswith("gram.")}
    assert {key.rpartition(".")[2] for key in grams} == {
        "q_proj",
        "o_proj",
        "gate_proj",
        "down_proj",
    }
    assert len([key for key in kept if key.startswith("fisher.")]) == 7
    numbers = 3 * (64 * 65) // 2 + (96 * 97) // 2
    assert sum(kept[key].numel() for key in grams) == numbers


@pytest.mark.parametrize(
    ("name", "asked", "kind"),
    [
        ("llama", "auto", "next_token"),
        ("qwen2", "nll", "next_token"),
        ("bert-mlm", "auto", "masked_token"),
        ("bert-classifier", "auto", "sampled"),
        ("bert", "auto", "output"),
        ("llama", "sampled", "sampled"),
        ("llama", "output", "output"),
        ("bert-classifier", "output", "output"),
        ("bert", "sampled", "sampled"),
    ],
)
def test_the_loss_follows_from_what_the_model_returns(
    name: str, asked: str, kind: str, checkpoint: Models
) -> None:
    module, _ = opened(checkpoint(name))
    network = make_network(module, device=CPU, dtype=None)
    batch = {"input_ids": torch.arange(5, 25).reshape(2, 10)}
    if name == "qwen2":
        batch["input_ids"] = batch["input_ids"] % 18
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(name))
    assert choose_loss(asked, network, batch, tokenizer).kind == kind


def test_the_loss_is_in_the_report(
    tmp_path: Path, checkpoint: Models, text: Path, llama_job: dict[str, Any]
) -> None:
    _, report = pico.compressed(tmp_path, llama_job)
    assert report["loss"]["kind"] == "next_token" and "next token" in report["loss"]["description"]
    _, report = pico.compressed(tmp_path, llama_job | {"compression.method": "svd"}, "--force")
    assert report["loss"] is None


@pytest.mark.parametrize("name", ["bert", "bert-classifier"])
def test_a_likelihood_needs_a_language_model(
    name: str, tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    changes = {"model.path": str(checkpoint(name)), "calibration.path": str(text)}
    ended = pico.call("compress", pico.job(tmp_path, changes | {"compression.loss": "nll"}), "-q")
    assert ended.code == 2 and ended.err.count("\n") == 1
    assert "compression.loss: nll needs" in ended.err and "use auto" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_masked_model_needs_a_mask_token(checkpoint: Models) -> None:
    network = make_network(opened(checkpoint("bert-mlm"))[0], device=CPU, dtype=None)
    batch = {"input_ids": torch.arange(5, 25).reshape(2, 10)}
    with pytest.raises(InputError, match="needs the tokenizer's mask token"):
        choose_loss("auto", network, batch, AutoTokenizer.from_pretrained(checkpoint("llama")))


def test_a_bfloat16_checkpoint_computed_in_float32_equals_its_float32_copy(
    tmp_path: Path, checkpoint: Models, text: Path
) -> None:
    exact = tmp_path / "exact"
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), dtype=torch.float32)
    model.save_pretrained(exact)
    pico.write_tokenizer(exact)
    states = []
    for path in (checkpoint("llama"), exact):
        folder = tmp_path / f"of-{path.name}"
        folder.mkdir()
        changes = {
            "model.path": str(path),
            "calibration.path": str(text),
            "compression.size": 1.0,
            "compression.layers": {"*": {"rank": 16}},
            "output.dtype": "float32",
            "runtime.dtype": "float32",
        }
        output, report = pico.compressed(folder, changes)
        assert report["provenance"]["activation_dtype"] == "float32"
        states.append(pico.read_state(output))
    assert set(states[0]) == set(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("method", ["frobenius", "curvature"])
def test_layers_without_statistics_stay_dense_and_are_named(
    method: str,
    tmp_path: Path,
    plain_folder: pico.PlainFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(plain_folder.path)
    changes = plain_folder.model("with_idle") | {"compression.method": method}
    config = pico.job(tmp_path, changes | {"compression.size": 0.9})
    ended = pico.call("compress", config, "--strict", "-q")
    assert ended.code == 4 and "fell back" in ended.err and "idle" in ended.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    layers = {layer["name"]: layer for layer in report["layers"]}
    assert layers["idle"]["fallback"] and "no calibration input" in layers["idle"]["reason"]
    assert layers["idle"]["storage"] == "dense"
    assert layers["detached"]["fallback"] == (method == "curvature")
    if method == "curvature":
        assert "does not depend on it" in layers["detached"]["reason"]
    assert not layers["used"]["fallback"]


@pytest.mark.parametrize("method", ["frobenius", "curvature"])
@pytest.mark.parametrize(
    ("scale", "code", "said"),
    [
        (1e-6, 1, "error: 2: NaN or infinity in its inputs"),  # the first sequence shows nothing
        (1.0, 2, "outputs are NaN or infinite on x (1, 24), first behind 0; set runtime"),
    ],
)
def test_an_overflow_on_the_calibration_data_names_the_layer(
    scale: float,
    code: int,
    said: str,
    method: str,
    tmp_path: Path,
    plain_folder: pico.PlainFolder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(plain_folder.path)
    state = pico.read_state(plain_folder.path / "mlp.safetensors")
    state["0.weight"] = state["0.weight"] * 1e38
    save_file(state, tmp_path / "mlp.safetensors")
    rows = pico.read_state(plain_folder.path / "rows.safetensors")["x"]
    rows[1:] *= scale
    save_file({"x": rows[:40].contiguous()}, tmp_path / "rows.safetensors")
    changes = plain_folder.model("mlp") | {
        "model.path": str(tmp_path / "mlp.safetensors"),
        "calibration.path": str(tmp_path / "rows.safetensors"),
    }
    ended = pico.call(
        "compress", pico.job(tmp_path, changes | {"compression.method": method}), "-q"
    )
    assert ended.code == code and ended.err.count("\n") == 1 and said in ended.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_network_computes_as_the_model_it_wraps(checkpoint: Models) -> None:
    module, _ = opened(checkpoint("llama"))
    plain = copy.deepcopy(module).float()
    network = make_network(module, device=CPU, dtype=torch.float32)
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(network({"input_ids": ids}).logits, plain(input_ids=ids).logits)
    stored = pico.read_state(checkpoint("llama"))
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert sum(p.numel() for p in module.parameters()) == sum(t.numel() for t in stored.values())


def test_the_chosen_labels_are_scored_once() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    _, labels = prepare(
        Loss(kind="next_token"), {"input_ids": ids, "attention_mask": mask}, torch.Generator()
    )
    assert labels is not None
    assert labels.tolist() == [[6, 7, -100, -100], [9, 10, 11, -100]]
    logits = torch.randn(2, 4, 12)
    nll = -logits.log_softmax(-1)
    wanted = sum(
        nll[i, t, labels[i, t]].item() for i, t in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))
    )
    (scalar,) = backward_scalars(
        Loss(kind="next_token"), SimpleNamespace(logits=logits), labels, torch.Generator()
    )
    assert scalar.item() == pytest.approx(wanted, rel=1e-5)


class InPlace(nn.Module):
    """Two layers read one address before and after a change in place. A third is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = x + 1
        first = self.a(h)
        second = self.b(h.relu_())
        return first + second + self.c(h) + self.d(input=h) + self.d(10 * h)


def test_only_layers_that_always_read_the_same_values_share_a_gram_matrix() -> None:
    module = InPlace()
    network = make_network(module, device=CPU, dtype=None)
    layers = [
        Layer(
            name=name,
            keys=Keys(f"{name}.weight"),
            kind="Linear",
            shape=(8, 8),
            dtype=torch.float32,
            unit="",
        )
        for name in "abcd"
    ]
    groups = input_groups(network, layers, {"x": torch.randn(4, 8)})
    assert groups == {"a": "a", "b": "b", "c": "b", "d": "d"}


@pytest.mark.parametrize("spread", [0.02, 0.1])
def test_a_bidirectional_model_is_never_taken_for_a_causal_one(
    checkpoint: Models, spread: float
) -> None:
    """Tokens hardly look at distant tokens here, and padding at the end changes nothing at all."""
    module, _ = opened(checkpoint("bert-mlm"))
    for parameter in module.parameters():
        nn.init.normal_(parameter.data, std=spread)
    network = make_network(module, device=CPU, dtype=torch.float32)
    ids = torch.arange(5, 25).reshape(1, 20)
    mask = torch.ones_like(ids)
    mask[0, 14:] = 0
    tokenizer = SimpleNamespace(mask_token_id=3)
    for batch in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        assert choose_loss("auto", network, batch, tokenizer).kind == "masked_token"


def test_padded_positions_of_the_output_do_not_count() -> None:
    """The gradients of probes and of drawn labels are zero at the padding."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for kind in ("output", "sampled"):
        output = torch.randn(2, 3, 5, requires_grad=True)
        for scalar in backward_scalars(
            Loss(kind=kind), output, None, torch.Generator().manual_seed(0), (mask,)
        ):
            scalar.backward(retain_graph=True)
        assert output.grad is not None
        touched = output.grad.abs().sum(-1) > 0
        assert torch.equal(touched, mask.bool())


def test_left_padding_is_neither_scored_nor_predicted_from() -> None:
    ids = torch.tensor([[0, 0, 5, 6]])
    mask = torch.tensor([[0, 0, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    _, labels = prepare(Loss(kind="next_token"), batch, torch.Generator())
    assert labels is not None and labels.tolist() == [[-100, -100, 6, -100]]


def test_tokens_of_encoder_and_decoder_are_told_apart_by_their_number() -> None:
    full, short = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)
    short[:, 4:] = 0
    other = full.clone()
    other[0, 3:] = 0  # but not in the last column of every sequence
    for encoder, decoder, widths in (
        (full, full, (6, 6)),
        (full, short, (6, 5)),
        (short, full, (5, 6)),
        (other, full, (6, 7)),
    ):
        batch = {"input_ids": full * 9, "decoder_input_ids": full * 8}
        masks = {"attention_mask": encoder, "decoder_attention_mask": decoder}
        found = told_apart(batch | masks)
        assert (found["input_ids"].shape[1], found["decoder_input_ids"].shape[1]) == widths
        for name, mask in masks.items():
            assert found[name].sum() == mask.sum()
    beside = batch | masks | {"attention_mask": short, "global_attention_mask": full}
    assert told_apart(beside)["input_ids"].shape[1] == 6


def test_no_room_to_tell_them_apart_is_said(tmp_path: Path) -> None:
    """Both have as many tokens as the model has positions, and no last column is all padding."""
    model = FAMILIES["bart"].settings | {"max_position_embeddings": 8}
    replace(FAMILIES["bart"], settings=model).build().save_pretrained(tmp_path / "dense")
    ids = torch.randint(4, 64, (8, 8), generator=torch.Generator().manual_seed(0))
    masks = torch.ones_like(ids), torch.ones_like(ids)
    masks[0][0, 4:] = 0
    batch = {"input_ids": ids, "decoder_input_ids": ids.flip(0).contiguous()}
    batch |= {"attention_mask": masks[0], "decoder_attention_mask": masks[1]}
    save_file(batch, tmp_path / "ids.safetensors")
    changes = {
        "model.path": str(tmp_path / "dense"),
        "calibration.path": str(tmp_path / "ids.safetensors"),
        "calibration.num_sequences": 8,
        "evaluation": None,
    }
    ended = pico.call("compress", pico.job(tmp_path, changes), "-q")
    assert ended.code == 2 and "both have 8 tokens" in ended.err and "last token" in ended.err


@pytest.mark.parametrize("width", [8, 12])
def test_a_decoder_leaves_out_its_own_padding(tmp_path: Path, width: int) -> None:
    """The decoder may have as many tokens as the encoder, whose padding is elsewhere."""
    media_helpers.write_model(tmp_path / "t5", "t5")
    ids = torch.randint(4, 40, (16, 12), generator=torch.Generator().manual_seed(0))
    mask, own = torch.ones_like(ids), torch.ones_like(ids[:, :width])
    mask[:, 4:] = 0
    own[:, width - 2 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    decoder = {"decoder_input_ids": ids[:, :width].clone(), "decoder_attention_mask": own}
    save_file(inputs | decoder, tmp_path / "ids.safetensors")
    changes = {
        "model.path": str(tmp_path / "t5"),
        "calibration.path": str(tmp_path / "ids.safetensors"),
        "calibration.num_sequences": 16,
        "compression.sequential": False,
        "compression.allocation": "uniform",
        "evaluation": None,
        "runtime.work_dir": str(tmp_path / "work"),
    }
    output, _ = pico.compressed(tmp_path, changes)
    tokens: dict[str, int] = {}
    work = WorkDirectory(tmp_path / "work", {})
    for file in (work.root / STATISTICS).glob("*.safetensors"):
        facts = work.facts(STATISTICS, file.stem)
        tokens |= {name: seen["tokens"] for name, seen in facts["layers"].items()}
    encoder, decoder_tokens = 16 * 4, 16 * (width - 2)
    assert tokens["encoder.block.1.layer.0.SelfAttention.q"] == encoder
    assert tokens["decoder.block.1.layer.1.EncDecAttention.k"] == encoder
    assert tokens["decoder.block.1.layer.1.EncDecAttention.q"] == decoder_tokens
    assert tokens["decoder.block.0.layer.2.DenseReluDense.wo"] == decoder_tokens
    ended = pico.call("verify", output, "--against", tmp_path / "t5")
    assert ended.code == 0, ended.out + ended.err
