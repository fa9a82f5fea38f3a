"""The config language: what is accepted, what is refused and where the message points."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc_cli.config import (
    Compression,
    Config,
    FieldError,
    LayerOverride,
    config_hash,
    json_schema,
    load_config,
    matches,
    parse_bytes,
    parse_config,
    to_dict,
    to_yaml,
)
from lrc_cli.errors import InputError

HEAD = "model: {path: m}\ncalibration: {path: c}\noutput: {path: o}\n"
MINIMAL = HEAD + "compression: {size: 0.8}\n"

EXAMPLE = """
model:
  path: models/smollm2-135m
  factory: null
  trust_remote_code: false
calibration:
  path: data/wikipedia.txt
  part: [0.0, 0.7]
  text_field: text
  chat_template: false
  num_sequences: 64
  sequence_length: 512
  seed: 0
certification:
  path: null
  part: [0.7, 0.9]
  num_sequences: 128
  sequence_length: null
  confidence: 0.95
  quantile: 0.95
evaluation:
  - {name: wikipedia, path: data/wikipedia.txt, part: [0.9, 1.0], num_sequences: 64}
  - {name: news, path: data/news.txt, num_sequences: 64}
compression:
  method: curvature
  loss: auto
  size: 0.8
  size_of: compressible
  allocation: global
  sequential: auto
  ridge: 0.01
  center: false
  storage: auto
  rank_multiple: auto
  include: ["*"]
  exclude: ["lm_head"]
  layers: {}
recover:
  scope: none
  tokens: auto
runtime:
  device: auto
  dtype: auto
  memory_limit: null
  work_dir: null
  seed: 0
output:
  path: out/smollm2-135m-lrc
  dtype: auto
  shard_size: 5GB
  remote_code: false
gates:
  max_perplexity_increase: null
  max_layer_error: null
"""


def errors(text: str, *overrides: str) -> list[str]:
    """The lines of the error that a config gives."""
    with pytest.raises(InputError) as caught:
        parse_config(text, "demo.yaml", overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).split("\n")


def flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        result |= flat(value, f"{path}{key}.") if nested else {path + key: value}
    return result


def test_defaults_are_those_of_the_contract() -> None:
    example = flat(to_dict(parse_config(EXAMPLE, "demo.yaml")))
    text = HEAD + "compression: {size: 0.8}\ncertification: {}\n"
    minimal = flat(to_dict(parse_config(text, "demo.yaml")))
    assert minimal.keys() == example.keys()
    differing = {key for key in example if example[key] != minimal[key]}
    required = {"model.path", "calibration.path", "output.path"}
    assert differing == required | {"calibration.part", "certification.part", "evaluation"}
    config = parse_config(MINIMAL, "demo.yaml")
    assert config.calibration.part is None
    assert config.certification is None
    assert config.evaluation is None


@pytest.mark.parametrize(
    ("written", "allocation"),
    [
        ("size: 0.8", "global"),
        ("size: 0.8, method: svd", "relative"),
        ("size: 0.8, method: frobenius", "relative"),
        ("size: 0.8, method: svd, allocation: global", "global"),
        ("size: 0.8, allocation: uniform", "uniform"),
    ],
)
def test_allocation_follows_the_method_unless_written(written: str, allocation: str) -> None:
    config = parse_config(f"{HEAD}compression: {{{written}}}", "demo.yaml")
    assert config.compression.allocation == allocation
    assert to_dict(config)["compression"]["allocation"] == allocation


def test_written_counts_differ_from_defaults() -> None:
    text = HEAD + "compression: {size: 1}\nevaluation: [{name: a, path: b, num_sequences: 64}]"
    config = parse_config(text, "demo.yaml")
    assert config.evaluation is not None
    assert config.calibration.num_sequences == config.evaluation[0].num_sequences == 64
    assert config.calibration.num_sequences_is_default
    assert not config.evaluation[0].num_sequences_is_default
    written = parse_config(text, "demo.yaml", ["calibration.num_sequences=64"])
    assert not written.calibration.num_sequences_is_default
    assert config_hash(written) == config_hash(config)
    again = parse_config(to_yaml(config), "again.yaml")
    assert again.calibration.num_sequences_is_default
    assert again.evaluation is not None
    assert not again.evaluation[0].num_sequences_is_default


KEY_POSITIONS = [
    ("compression:\n  size: 0.8\n  metod: svd\n", "6:3: compression.metod: unknown key"),
    ("compression:\n  size: 0.8\n  metod: svd\n", "did you mean 'method'?"),
    ("compression: {size: 0.8}\noutputt: {}\n", "5:1: outputt: unknown key; did you mean 'output'"),
    ("compression: {size: 0.8}\nridge: 1\n", "did you mean 'compression.ridge'?"),
    ("compression: {size: 0.8}\nzzzz: 1\n", "5:1: zzzz: unknown key; allowed: model, calibration"),
    (
        "compression:\n  size: 0.8\n  size: 0.7\n",
        "6:3: compression.size: duplicate key, first given at demo.yaml:5:3",
    ),
    ("compression: {size: 0.8, ? [a] : 1}\n", "4:28: compression: a key must be a text"),
    (
        'compression: {size: 0.8, layers: {"re:(": {size: 1}}}\n',
        "4:35: compression.layers: expected a glob or",
    ),
    (
        "compression: {size: 0.8}\nevaluation:\n  - {name: a}\n",
        "6:5: evaluation.0.path: missing key",
    ),
]


@pytest.mark.parametrize(("text", "expected"), KEY_POSITIONS)
def test_wrong_keys_are_pointed_at(text: str, expected: str) -> None:
    (line,) = errors(HEAD + text)
    assert line.startswith("demo.yaml:")
    assert expected in line


VALUES = [
    ("size: true", "4:21: compression.size: expected a number above 0 and at most 1, or null, got"),
    ('size: "0.8"', "got '0.8'; remove the quotes"),
    ("size: 1.7", "4:21: compression.size: expected a number above 0 and at most 1"),
    ("size: 0", "at most 1, or null, got 0"),
    ("size: -0.5", "got -0.5"),
    ("size: .nan", "got nan"),
    ("size: .inf", "got inf"),
    ("size: [0.8]", "got [0.8]"),
    ("size: {a: 1}", "got a mapping"),
    ("size: !!int x", "4:21: compression.size: 'x' cannot be read"),
    ("size: !!int ''", "4:21: compression.size: '' cannot be read"),
    ("size: !!int '+'", "4:21: compression.size: '+' cannot be read"),
    ("size: !!int _", "4:21: compression.size: '_' cannot be read"),
    ("size: !!int 0x", "4:21: compression.size: '0x' cannot be read"),
    ("size: !!int 0o9", "4:21: compression.size: '0o9' cannot be read"),
    ("size: !!float ''", "4:21: compression.size: '' cannot be read"),
    ("size: !!float '-'", "4:21: compression.size: '-' cannot be read"),
    ("size: !!float .", "4:21: compression.size: '.' cannot be read"),
    ("size: !!bool ''", "4:21: compression.size: '' cannot be read"),
    ("size: !!bool maybe", "4:21: compression.size: 'maybe' cannot be read"),
    ("size: !mine 1", "4:21: compression.size: the tag '!mine' is not allowed"),
    (
        "max_layer_error: 1",
        "4:32: compression.max_layer_error: expected a number above 0 and below",
    ),
    ("max_loss_increase: 0", "compression.max_loss_increase: expected a number above 0"),
    ("size: 0.8, ridge: 0", "4:33: compression.ridge: expected a number above 0, got 0"),
    (
        "size: 0.8, method: curvatur",
        "4:34: compression.method: expected one of svd, frobenius, nuclear, relu, curvature, "
        "got 'curvatur'; "
        "did you mean 'curvature'?",
    ),
    ("size: 0.8, loss: 3", "compression.loss: expected one of auto, nll, sampled, output, got 3"),
    ("size: 0.8, sequential: 0", "compression.sequential: expected auto or true or false, got 0"),
    ("size: 0.8, rank_multiple: 0", "expected auto or a whole number at least 1, got 0"),
    ("size: 0.8, rank_multiple: true", "expected auto or a whole number at least 1, got true"),
    ("size: 0.8, include: lm_head", "compression.include: expected a list, each item a glob or"),
    ("size: 0.8, exclude: [a, 're:[']", "4:39: compression.exclude.1: expected a glob or"),
    ("size: 0.8, layers: [a]", "compression.layers: expected a mapping, got ['a']"),
    (
        "size: 0.8, layers: {'a.*': {size: 0.5, rank: 3}}",
        "4:60: compression.layers.a.*.rank: at most one of size, rank may be given",
    ),
    ("size: 0.8, layers: {a: {rank: 1.5}}", "compression.layers.a.rank: expected a whole number"),
]


@pytest.mark.parametrize(("written", "expected"), VALUES)
def test_impossible_compression_values_are_pointed_at(written: str, expected: str) -> None:
    (line,) = errors(f"{HEAD}compression: {{{written}}}")
    assert line.startswith("demo.yaml:4:")
    assert expected in line


SECTIONS = [
    ("certification: {confidence: 1.5}", "5:29: certification.confidence: expected a number above"),
    ("certification: {quantile: 0}", "5:27: certification.quantile: expected a number above 0"),
    ("certification: {part: [0.9, 0.2]}", "5:23: certification.part: expected [start, end] with"),
    ("certification: {part: [0.9]}", "5:23: certification.part: expected [start, end] with"),
    ("certification: {part: [0, x]}", "5:27: certification.part.1: expected a number, got 'x'"),
    ("certification: {num_sequences: 2.0}", "expected a whole number at least 1, got 2.0"),
    ("certification: {sequence_length: 1}", "expected a whole number at least 2, or null, got 1"),
    ("certification: 3", "5:16: certification: expected a mapping, got 3"),
    ("evaluation: {name: a}", "5:13: evaluation: expected a list"),
    (
        "evaluation:\n- {name: a, path: b}\n- {name: a, path: c}",
        "7:10: evaluation.1.name: 'a' is given twice",
    ),
    ("runtime: {device: gpu}", "5:19: runtime.device: expected auto, cpu, cuda, cuda:N or mps"),
    ("runtime: {seed: -1}", "5:17: runtime.seed: expected a whole number at least 0"),
    ("runtime: {dtype: float8}", "5:18: runtime.dtype: expected one of auto, float64, float32"),
    ("runtime: {work_dir: 12}", "5:21: runtime.work_dir: expected a text that is not empty"),
]


@pytest.mark.parametrize(("text", "expected"), SECTIONS)
def test_impossible_values_elsewhere_are_pointed_at(text: str, expected: str) -> None:
    (line,) = errors(MINIMAL + text)
    assert line.startswith("demo.yaml:")
    assert expected in line


@pytest.mark.parametrize("size", ["5gb", "0GB", "-1", "0", "1.5"])
def test_impossible_shard_sizes(size: str) -> None:
    (line,) = errors(MINIMAL.replace("path: o", f"path: o, shard_size: {size}"))
    assert line.startswith("demo.yaml:3:31: output.shard_size: ")


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("output.remote_code", "true", "true"),
    ],
)
def test_features_of_later_versions_are_named(key: str, value: str, shown: str) -> None:
    (line,) = errors(MINIMAL, f"{key}={value}")
    assert line.startswith(f"--set {key}: {key}: {shown} is not in this version; allowed: ")


def test_required_keys() -> None:
    assert errors("runtime: {}\n") == [
        "demo.yaml:1:1: calibration.path: missing key; expected a text that is not empty",
        "demo.yaml:1:1: compression: exactly one of size, max_layer_error, max_loss_increase, "
        "threshold must be given; none is",
        "demo.yaml:1:1: model.path: missing key; expected a text that is not empty",
        "demo.yaml:1:1: output.path: missing key; expected a text that is not empty",
    ]
    (line,) = errors("\nmodel:\n  factory: a:b\n" + MINIMAL.split("\n", 1)[1])
    assert line.startswith("demo.yaml:2:1: model.path: missing key")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{}", "4:1: compression: exactly one of size, max_layer_error, max_loss_increase"),
        ("{size: null}", "4:1: compression: exactly one of"),
        ("{size: 0.5, max_layer_error: 0.1}", "4:43: compression.max_layer_error: exactly one of"),
        ("{max_loss_increase: 0.1, method: svd}", "4:34: compression.max_loss_increase: needs"),
        ("{size: 0.5, method: nuclear, threshold: 0.1}", "4:54: compression.threshold: exactly"),
        ("{threshold: 0.1}", "4:26: compression.threshold: needs method nuclear, not curvature"),
        ("{method: nuclear, threshold: 1}", "4:43: compression.threshold: expected a number"),
        (
            "{method: nuclear, threshold: 0.1, rank_multiple: 8}",
            "4:63: compression.rank_multiple: must be auto with threshold",
        ),
    ],
)
def test_exactly_one_target(written: str, expected: str) -> None:
    (line,) = errors(f"{HEAD}compression: {written}\n")
    assert line.startswith(f"demo.yaml:{expected}")


@pytest.mark.parametrize(
    ("written", "target"),
    [
        ("size: 1", ("size", 1.0)),
        ("size: null, max_layer_error: 1e-2", ("max_layer_error", 0.01)),
        ("max_loss_increase: 5E-1", ("max_loss_increase", 0.5)),
        ("threshold: 0.25, method: nuclear", ("threshold", 0.25)),
    ],
)
def test_targets(written: str, target: tuple[str, float]) -> None:
    config = parse_config(f"{HEAD}compression: {{{written}}}", "demo.yaml")
    assert config.compression.target == target
    assert isinstance(config.compression.target[1], float)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "demo.yaml:1:1: the config is empty; it needs model"),
        ("# nothing\n", "demo.yaml:1:1: the config is empty"),
        ("- a\n", "demo.yaml:1:1: expected a mapping, got ['a']"),
        ("model: {path: a\noutput: 3\n", "demo.yaml:2:7: not valid YAML: while parsing a flow"),
        ("model:\n\tpath: a\n", "demo.yaml:2:1: not valid YAML: a tab cannot indent; use spaces"),
        ("model: 'a\n", "demo.yaml:2:1: not valid YAML: while scanning a quoted scalar"),
        ("a: 1\n---\nb: 1\n", "demo.yaml:2:1: not valid YAML: expected a single document"),
        ("a: *b\n", "demo.yaml:1:4: not valid YAML: found undefined alias"),
        ("a: 1\nb: x\x07\n", "demo.yaml:2:5: not valid YAML: the character U+0007 is not allowed"),
        ("a: " + "[" * 5000, "demo.yaml:1:1: nested too deeply"),
    ],
)
def test_what_is_not_a_config(text: str, expected: str) -> None:
    (line,) = errors(text)
    assert line.startswith(expected)


def test_anchors_are_followed_and_may_not_contain_themselves() -> None:
    text = HEAD.replace("{path: c}", "{path: c, part: &p [0, 0.5]}")
    config = parse_config(
        f"{text}compression: {{size: 0.8}}\ncertification: {{part: *p}}", "demo.yaml"
    )
    assert config.certification is not None
    assert config.certification.part == config.calibration.part == (0.0, 0.5)
    (line,) = errors(MINIMAL + "evaluation: &e [*e]\n")
    assert line == "demo.yaml:5:13: evaluation.0: contains itself; write the value out"


def test_a_bomb_of_aliases_is_refused_at_once() -> None:
    lines = [f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 30)]
    text = "\n".join(["x0: &x0 [a]", *lines, "runtime: {device: *x29, seed: *x29}\n"])
    assert errors(MINIMAL + text)[-1] == "and 22 more"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(EXAMPLE)), st.integers(0, 12), st.text(max_size=6))
def test_no_slip_of_the_keyboard_is_a_traceback(start: int, length: int, typed: str) -> None:
    text = EXAMPLE[:start] + typed + EXAMPLE[start + length :]
    try:
        config = parse_config(text, "demo.yaml")
    except InputError as error:
        assert all(line.startswith(("demo.yaml:", "and ")) for line in str(error).split("\n"))
    else:
        assert parse_config(to_yaml(config), "again.yaml") == config


def test_all_problems_are_listed_in_order_and_ten_at_most() -> None:
    lines = errors(HEAD + "compression:\n  ridge: -1\n  metod: svd\n  size: 2\n")
    assert [line.split(":")[1] for line in lines] == ["5", "6", "7"]
    lines = errors(MINIMAL + "".join(f"x{i}: 1\n" for i in range(13)))
    assert len(lines) == 11
    assert lines[-1] == "and 3 more"


def test_overrides_replace_and_add_keys() -> None:
    overrides = [
        "compression.size=null",
        "compression.max_layer_error=1e-2",
        "certification.part=[0.5, 1]",
        "evaluation=[{name: a, path: b}]",
        "evaluation.0.num_sequences=3",
        "compression.layers.model.layers.0.*.size=0.5",
        "compression.layers.model.layers.1.*={rank: 5}",
        "runtime.seed=1",
        "runtime.seed=2",
        "model.path=a=b",
    ]
    config = parse_config(MINIMAL, "demo.yaml", overrides)
    assert config.compression.target == ("max_layer_error", 0.01)
    assert config.certification is not None
    assert config.certification.part == (0.5, 1.0)
    assert config.evaluation is not None
    assert config.evaluation[0].num_sequences == 3
    assert config.compression.layers == {
        "model.layers.0.*": LayerOverride(size=0.5),
        "model.layers.1.*": LayerOverride(rank=5),
    }
    assert config.runtime.seed == 2
    assert config.model.path == "a=b"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("compression.size=1.7", "--set compression.size: compression.size: expected a number"),
        ("compression.metod=svd", "--set compression.metod: compression.metod: unknown key"),
        ("compression.size", "--set compression.size: expected KEY=VALUE"),
        ("=3", "--set : expected KEY=VALUE"),
        ("compression.size={", "--set compression.size: not valid YAML"),
        ("compression.size.a=3", "--set compression.size.a: not a mapping"),
        ("evaluation.0.name=a", "--set evaluation.0.name: "),
        (
            "compression.layers.a={rank: 1, rank: 2}",
            "--set compression.layers.a: compression.layers.a.rank: duplicate",
        ),
    ],
)
def test_wrong_overrides_are_named(override: str, expected: str) -> None:
    assert errors(MINIMAL, override)[0].startswith(expected)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"model:\n  path: caf\xe9\n")
    cases = {
        tmp_path / "none.yaml": "there is no such file; ",
        tmp_path: "is a directory; ",
        latin: "not UTF-8 text; ",
        latin / "below.yaml": "cannot be read",
    }
    for path, expected in cases.items():
        with pytest.raises(InputError, match=expected) as caught:
            load_config(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"latin\.yaml:2: not UTF-8"):
        load_config(latin)


def test_a_byte_order_mark_and_other_scripts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("path: m", "path: modèle").encode())
    config = load_config(path, ["compression.size=0.5"])
    assert config.model.path == "modèle"
    assert config.compression.size == 0.5
    assert load_config(path).compression.size == 0.8


@pytest.mark.parametrize("text", [EXAMPLE, MINIMAL])
def test_the_resolved_yaml_reads_back(text: str) -> None:
    config = parse_config(text, "demo.yaml", ["compression.ridge=1e-7"])
    again = parse_config(to_yaml(config), "resolved.yaml")
    assert again == config
    assert config_hash(again) == config_hash(config)


def test_the_hash_covers_what_changes_weights_and_nothing_else() -> None:
    def hash_of(*overrides: str) -> str:
        return config_hash(parse_config(EXAMPLE, "demo.yaml", overrides))

    base = hash_of()
    assert len(base) == 64
    assert base == config_hash(parse_config(EXAMPLE, "other.yaml"))
    sections = EXAMPLE.strip().split("\nruntime:")
    assert base == config_hash(parse_config(f"runtime:{sections[1]}\n{sections[0]}", "demo.yaml"))
    assert base == hash_of("output.path=elsewhere", "runtime.work_dir=w", "evaluation=[]")
    changes = [
        "compression.size=0.7",
        "calibration.seed=1",
        "calibration.num_sequences=65",
        "certification.part=[0.7, 0.8]",
        "output.dtype=float16",
        "runtime.seed=1",
        "model.path=m2",
        "compression.layers={a: {size: 0.5}, b: {size: 0.6}}",
        "compression.layers={b: {size: 0.6}, a: {size: 0.5}}",
    ]
    assert len({base, *map(hash_of, changes)}) == len(changes) + 1


def test_layer_patterns() -> None:
    assert matches("model.layers.*.q_proj", "model.layers.0.self_attn.q_proj")
    assert not matches("q_proj", "model.q_proj")
    assert not matches("LM_head", "lm_head")
    assert matches(r"re:.*\.(up|down)", "a.b.up")
    assert not matches("re:up", "a.up")
    compression = Compression(
        size=0.5,
        exclude=("*.v",),
        layers={"*.up": LayerOverride(rank=3), "a.*": LayerOverride(method="svd")},
    )
    assert compression.override("b.up") == LayerOverride(rank=3)
    assert compression.override("a.up") == LayerOverride(method="svd")
    assert compression.override("b.down") == LayerOverride()
    assert compression.selects("a.q")
    assert not compression.selects("a.v")


def test_sizes_in_bytes() -> None:
    sizes: dict[str | int, int] = {
        "5GB": 5 * 10**9,
        "500MB": 5 * 10**8,
        "1GiB": 2**30,
        "1.5 KB": 1500,
        "12B": 12,
        7: 7,
    }
    assert {size: parse_bytes(size) for size in sizes} == sizes
    with pytest.raises(ValueError, match="5GB"):
        parse_bytes("many")
    assert parse_config(MINIMAL, "demo.yaml").output.shard_bytes == 5 * 10**9


def test_configs_built_in_python_are_checked_too() -> None:
    with pytest.raises(FieldError, match="exactly one"):
        Compression(size=0.5, max_layer_error=0.1)
    with pytest.raises(FieldError, match="at most one"):
        LayerOverride(size=0.5, rank=3)


def schema_accepts(text: str, *overrides: str) -> bool:
    import yaml

    document = yaml.safe_load(text)
    for override in overrides:
        path, _, value = override.partition("=")
        *sections, key = path.split(".")
        target = document
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = yaml.safe_load(value)
    return bool(jsonschema.Draft202012Validator(json_schema()).is_valid(document))


def test_the_schema_accepts_what_is_accepted() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    assert schema_accepts(EXAMPLE)
    assert schema_accepts(MINIMAL, "runtime=null", "certification=null", "evaluation=null")
    assert schema_accepts(MINIMAL, "compression={size: null, max_layer_error: 0.1}")
    assert schema_accepts(to_yaml(parse_config(EXAMPLE, "demo.yaml")))


@pytest.mark.parametrize(
    "override",
    [
        "compression.size=1.7",
        "compression.size=0",
        "compression.size=true",
        "compression.metod=svd",
        "compression.method=linear",
        "compression.threshold=0.1",
        "compression.max_layer_error=0.1",
        "compression.layers={a: {size: 0.5, rank: 3}}",
        "compression.layers={a: {method: linear}}",
        "calibration.part=[0.1]",
        "calibration.part=[0.1, 2]",
        "runtime.device=gpu",
        "output={}",
        "gates.max_layer_error=0",
        "evaluation=[{name: a}]",
    ],
)
def test_the_schema_refuses_what_is_refused(override: str) -> None:
    errors(MINIMAL, override)
    assert not schema_accepts(MINIMAL, override)


def test_the_schema_documents_every_key() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    compression = schema["properties"]["compression"]["properties"]
    assert compression["method"]["enum"] == [
        "svd",
        "frobenius",
        "nuclear",
        "relu",
        "curvature",
    ]
    assert compression["method"]["default"] == "curvature"
    assert schema["required"] == ["model", "calibration", "compression", "output"]

    def check(part: Any) -> None:
        if isinstance(part, dict):
            for key in part.get("properties", {}).values():
                assert len(key.get("description", "not")) > 3 or "not" in key
            for value in part.values():
                check(value)

    check(schema)
    config = parse_config(MINIMAL, "demo.yaml")
    defaults = schema["properties"]["calibration"]["properties"]
    for name, value in to_dict(config)["calibration"].items():
        assert name == "path" or defaults[name]["default"] == value


def test_the_config_is_read_without_heavy_imports() -> None:
    code = (
        "import sys, lrc_cli.config; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_configs_cannot_be_changed() -> None:
    config: Config = parse_config(MINIMAL, "demo.yaml")
    with pytest.raises(AttributeError):
        config.runtime.seed = 3  # type: ignore[misc]
