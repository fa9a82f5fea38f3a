"""No code of a stranger's checkpoint, data or output runs unless the user asks for it.

Every case hides code that would write a file of its own. The commands may refuse or go on; the file
must not be there afterwards.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
import yaml
from pico import Models

from lrc_cli import load
from lrc_cli.errors import LrcError

CANARY = "LRC_TEST_CANARY"
"""The variable with the file that hidden code writes."""
CODE = f"""import os, pathlib
pathlib.Path(os.environ["{CANARY}"]).write_text("ran")
def make():
    pathlib.Path(os.environ["{CANARY}"]).write_text("ran")
class Own:
    pass
"""


def _touch() -> None:
    Path(os.environ[CANARY]).write_text("ran")


class Pickled:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _touch, ()


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that hidden code would write."""
    monkeypatch.setenv(CANARY, str(tmp_path / "canary"))
    return tmp_path / "canary"


def test_the_hidden_code_would_run(canary: Path) -> None:
    pickle.loads(pickle.dumps(Pickled()))
    assert canary.exists()
    canary.unlink()
    exec(CODE)
    assert canary.exists()


def edit(file: Path, **changes: Any) -> None:
    """Changes keys of a JSON file."""
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | changes))


def in_place_of_weights(model: Path, name: str) -> None:
    for file in model.glob("*.safetensors"):
        file.unlink()
    torch.save({"weight": Pickled()}, model / name)


def beside_tensors(model: Path, name: str) -> None:
    state: dict[str, Any] = pico.read_state(model)
    for file in model.glob("*.safetensors"):
        file.unlink()
    torch.save(state | {"hook": Pickled()}, model / name)


def beside_the_weights(model: Path, name: str) -> None:
    torch.save({"state": Pickled()}, model / name)


def raw(model: Path, name: str) -> None:
    for file in model.glob("*.safetensors"):
        file.unlink()
    (model / name).write_bytes(pickle.dumps(Pickled()))


def own_class(model: Path, config: str, auto: str, module: str) -> None:
    """Writes a module beside the weights that an auto class is told to take."""
    (model / f"{module}.py").write_text(CODE)
    reference: Any = f"{module}.Own"
    edit(model / config, auto_map={auto: [reference, None] if "Tokenizer" in auto else reference})


def own_model(model: Path) -> None:
    own_class(model, "config.json", "AutoModelForCausalLM", "modeling_own")
    edit(model / "config.json", architectures=["Own"])


def own_config(model: Path) -> None:
    own_class(model, "config.json", "AutoConfig", "configuration_own")
    edit(model / "config.json", model_type="own")


def own_tokenizer(model: Path) -> None:
    own_class(model, "tokenizer_config.json", "AutoTokenizer", "tokenization_own")
    edit(model / "tokenizer_config.json", tokenizer_class="Own")


def own_processor(model: Path) -> None:
    own_class(model, "preprocessor_config.json", "AutoImageProcessor", "processing_own")
    edit(model / "preprocessor_config.json", image_processor_type="Own")


def named_factory(model: Path) -> None:
    """Names a factory in the metadata of the weights, with its module in the working directory."""
    (model / "config.json").unlink()
    (model / "evil_factories.py").write_text(CODE)
    state = pico.read_state(model)
    record = json.dumps({"format_version": 1, "factory": "evil_factories:make", "layers": {}})
    for file in model.glob("*.safetensors"):
        file.unlink()
    pico.save_file(state, model / "model.safetensors", {"format": "pt", "lrc": record})
    os.chdir(model)


def template(model: Path, text: str) -> None:
    (model / "chat_template.jinja").write_text(text)


def modules_of_python(model: Path) -> None:
    """Puts modules into the working directory that Python or a test runner imports by itself."""
    for name in ("sitecustomize", "usercustomize", "conftest", "transformers", "torch", "lrc_cli"):
        (model / f"{name}.py").write_text(CODE)
    os.chdir(model)


def generation_code(model: Path) -> None:
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(CODE)
    edit(model / "generation_config.json", custom_generate="custom_generate")


COMMAND = f"__import__('pathlib').Path(__import__('os').environ['{CANARY}']).write_text('ran')"
ESCAPES = {
    "globals": "{{ cycler.__init__.__globals__.os.system('touch $" + CANARY + "') }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ messages.__class__.__base__ }}",
    "eval": "{{ lipsum.__globals__['__builtins__']['eval'](\"" + COMMAND + '") }}',
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
}
CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "a pickle in pytorch_model.bin": lambda m: in_place_of_weights(m, "pytorch_model.bin"),
    "a pickle beside tensors": lambda m: beside_tensors(m, "pytorch_model.bin"),
    "a pickle in a .ckpt": lambda m: in_place_of_weights(m, "last.ckpt"),
    "a pickle in a .pt": lambda m: in_place_of_weights(m, "model.pt"),
    "a bare pickle": lambda m: raw(m, "pytorch_model.bin"),
    "a bare pickle called .safetensors": lambda m: raw(m, "model.safetensors"),
    "a pickle in .metadata": lambda m: raw(m, ".metadata"),
    "an optimizer state": lambda m: beside_the_weights(m, "optimizer.pt"),
    "training arguments": lambda m: beside_the_weights(m, "training_args.bin"),
    "a second form that is a pickle": lambda m: beside_the_weights(m, "pytorch_model.bin"),
    "a model class": own_model,
    "a config class": own_config,
    "a tokenizer class": own_tokenizer,
    "a processor class": own_processor,
    "a factory in the metadata": named_factory,
    "modules in the working directory": modules_of_python,
    "code for generation": generation_code,
    **{f"a chat template ({k})": lambda m, t=t: template(m, t) for k, t in ESCAPES.items()},
}
CHATS = [[{"role": "user", "content": pico.words(60, seed=i)}] for i in range(40)]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_of_a_checkpoint(
    name: str, tmp_path: Path, canary: Path, checkpoint: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))
    CHECKPOINTS[name](model)
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    changes = {"model.path": str(model), "calibration.path": str(chats)}
    changes |= {"calibration.chat_template": True, "evaluation": [], "compression.method": "svd"}
    codes = {
        "inspect": pico.call("inspect", model).code,
        "compress": pico.call("compress", pico.job(tmp_path, changes)).code,
        "plan": pico.call("plan", tmp_path / "job.yaml", "--output", tmp_path / "other").code,
    }
    if codes["compress"] == 0:
        codes["verify"] = pico.call("verify", tmp_path / "out", "--against", model).code
    try:
        load(model)
    except LrcError:
        codes["load"] = 2
    assert not canary.exists(), codes
    assert set(codes.values()) <= {0, 2}


def test_of_data(tmp_path: Path, canary: Path, checkpoint: Models) -> None:
    np.savez(tmp_path / "ids.npz", input_ids=np.array([Pickled()], dtype=object))
    changes = {"model.path": str(checkpoint("llama")), "calibration.part": None}
    changes |= {"calibration.path": str(tmp_path / "ids.npz"), "evaluation": []}
    assert pico.call("compress", pico.job(tmp_path, changes)).code == 2
    assert not canary.exists()


TAG = f"!!python/object/apply:os.system ['touch ${CANARY}']\n"


def yaml_tag(output: Path) -> None:
    (output / "lrc.yaml").write_text(TAG)


def yaml_key(output: Path) -> None:
    text = (output / "lrc.yaml").read_text()
    (output / "lrc.yaml").write_text(text.replace("seed: 0", f"seed: {TAG.strip()}", 1))


def asks_for_code(output: Path) -> None:
    """Lets config and report ask for code that lies in the output."""
    config = yaml.safe_load((output / "lrc.yaml").read_text())
    config["model"] |= {"factory": "evil_factories:make", "trust_remote_code": True}
    (output / "lrc.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (output / "evil_factories.py").write_text(CODE)
    os.chdir(output)


OUTPUTS: dict[str, Callable[[Path], None]] = {
    "a tag of YAML": yaml_tag,
    "a tag in a value of YAML": yaml_key,
    "a factory and trust_remote_code in lrc.yaml": asks_for_code,
    "a model class": own_model,
    "a config class": own_config,
    "a tokenizer class": own_tokenizer,
    "a pickle for weights": lambda output: raw(output, "pytorch_model.bin"),
    "a pickle called .safetensors": lambda output: raw(output, "model.safetensors"),
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, checkpoint: Models, text: Path) -> Path:
    """Returns an output; tests must not change it."""
    changes = {"model.path": str(checkpoint("llama")), "calibration.path": str(text)}
    made, _ = pico.compressed(tmp_path_factory.mktemp("output"), changes)
    return made


@pytest.mark.parametrize("name", OUTPUTS)
def test_of_an_output(
    name: str,
    tmp_path: Path,
    canary: Path,
    output: Path,
    checkpoint: Models,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = Path(shutil.copytree(output, tmp_path / "out"))
    OUTPUTS[name](copy)
    against = ("--against", checkpoint("llama"))
    codes = [pico.call("verify", copy).code, pico.call("verify", copy, *against).code]
    codes.append(pico.call("eval", copy, *against).code)
    assert not canary.exists(), codes
    assert set(codes) <= {0, 2, 3} and 3 in codes


def test_of_a_config(tmp_path: Path, canary: Path) -> None:
    (tmp_path / "job.yaml").write_text(TAG)
    assert pico.call("compress", tmp_path / "job.yaml").code == 2
    assert pico.call("compress", tmp_path / "none.yaml", "--set", f"output.path={TAG}").code == 2
    assert not canary.exists()
