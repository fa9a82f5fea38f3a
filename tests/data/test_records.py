"""Texts, conversations, token ids and tensors are read, and some are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
from data_helpers import drawn, write_records
from pico import Models
from safetensors.torch import save_file
from transformers import AutoTokenizer

from lrc_cli.data.draw import Purpose, draw
from lrc_cli.data.processors import Processors
from lrc_cli.errors import InputError

TEXTS = [pico.words(40, seed=i) for i in range(8)]
TEMPLATE = (
    "{% for m in messages %}{{ 'w1' if m.role == 'user' else 'w2' }} {{ m.content }} {% endfor %}"
)
CHATS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": pico.words(9, seed=i)}]
    for i, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Models) -> Any:
    """Returns the pico Llama's tokenizer, with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_texts_of_records_are_those_of_one_file(
    suffix: str, tokenizer: Any, tmp_path: Path
) -> None:
    texts = [*TEXTS, 'w1 "w2", w3\nw4', pico.words(200_000 if suffix == ".csv" else 10)]
    (tmp_path / "all.txt").write_text("\n\n".join(texts))
    file = write_records(tmp_path / f"data{suffix}", "body", texts)
    own = Processors(tokenizer=tokenizer)
    found = drawn(file, own, text_field="body")
    assert found.sha256 == drawn(tmp_path / "all.txt", own).sha256
    with pytest.raises(
        InputError, match=r"no text under the key 'text'; .* \(there are 'n.*'body'"
    ):
        drawn(file, own)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_token_ids_are_taken_as_they_are(suffix: str, tmp_path: Path) -> None:
    ids = [list(range(100 * i, 100 * i + 7 + i)) for i in range(1, 12)]
    file = write_records(tmp_path / f"ids{suffix}", "tokens", ids)
    stream = [token for row in ids for token in row]
    found = drawn(file, Processors(), text_field="tokens", sequence_length=8)
    pieces = [stream[i : i + 8] for i in range(0, len(stream) - 7, 8)]
    assert all(row in pieces for row in found.inputs["input_ids"].tolist())
    assert found.population == len(pieces)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_conversations_are_rendered_by_the_chat_template(
    suffix: str, tokenizer: Any, tmp_path: Path
) -> None:
    file = write_records(tmp_path / f"chats{suffix}", "messages", CHATS)
    found = drawn(file, Processors(tokenizer=tokenizer), chat_template=True)
    stream = [
        token
        for chat in CHATS
        for token in tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    ]
    pieces = [stream[i : i + 16] for i in range(0, len(stream) - 15, 16)]
    assert all(row in pieces for row in found.inputs["input_ids"].tolist())
    assert pico.VOCABULARY.index("w2") in stream and found.population == len(pieces)


MESSAGES = {
    "a null": ('{"text": null}', "a.jsonl:2: no text under the key 'text', which is null; leave"),
    "an array": ('[{"text": "w1"}]', "a.jsonl:2: holds an array of 1, not a record; .* jq -c"),
    "a text": ('"w1"', 'a.jsonl:2: holds "w1", not a record; write one record a line, such as'),
    "a number": ("3", "a.jsonl:2: holds 3, not a record"),
    "null": ("null", "a.jsonl:2: holds null, not a record"),
    "true": ("true", "a.jsonl:2: holds true, not a record"),
    "nothing": ("{}", "a.jsonl:2: no text under the key 'text'; set text_field"),
    "another key": ('{"body": "w1"}', r"a.jsonl:2: .*right key \(there are 'body'\)"),
    "many keys": (
        '{"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6, "g": 7}', "'d', 'e', 2 more",
    ),
    "a key in another case": ('{"Text": "w1"}', r"there are 'Text'"),
    "a text inside": ('{"data": {"text": "w1"}}', "key 'text', which is inside 'data'; write it"),
    "an object": ('{"text": {"de": "w1"}}', "but an object with the keys 'de'"),
    "a list of texts": ('{"text": ["w1"]}', "no text under the key 'text', nor token ids"),
    "an empty list": ('{"text": []}', "no text under the key 'text', nor token ids"),
    "a boolean": ('{"text": true}', "no text under the key 'text', nor token ids"),
    "a record over lines": ("{", "a.jsonl:2: not valid JSON .*; write one record a line: jq"),
    "an array over lines": ("[", "a.jsonl:2: not valid JSON .*; write one record a line: jq"),
    "a comma behind": ('{"text": "w1"},', "a.jsonl:2: not valid JSON .*; mend the line"),
    "half a record": ('{"text": "w', "a.jsonl:2: not valid JSON .*; mend the line"),
    "single quotes": ("{'text': 'w1'}", "a.jsonl:2: not valid JSON .*; mend the line"),
    "depth": ("[" * 100_000, "a.jsonl:2: not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_record_that_is_none_is_named_by_its_line(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    line, message = MESSAGES[kind]
    (tmp_path / "a.jsonl").write_text(f'\ufeff{{"text": "w1 w2"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(InputError, match=message.replace("is null;", "is null or has no value;")):
        drawn(tmp_path / "a.jsonl", Processors(tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.json", "write one record a line: jq -c"),
        ("a.jsonl.gz", "unpack it"),
        ("a.zst", "unpack it"),
        ("a.xlsx", "use ."),
    ],
)
def test_files_of_another_kind_have_a_way_out(name: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=f"not a kind of data this version reads; {remedy}"):
        drawn(tmp_path / name, Processors())


def test_records_without_text_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    file = write_records(tmp_path / "a.jsonl", "text", [*TEXTS, "", "  "])
    assert drawn(file, Processors(tokenizer=tokenizer)).findings.empty_records == 2


RECORDS: dict[str, tuple[str, list[Any], dict[str, Any], str]] = {
    "mixed": (".jsonl", ["w1", [1, 2]], {}, r"jsonl:2: 'text' holds token ids, and text before"),
    "numbers": (".jsonl", [1.5], {}, "jsonl:1: no text under the key 'text', nor token ids"),
    "huge": (".jsonl", [[2**63]], {}, "jsonl:1: no text under the key 'text', nor token ids"),
    "null": (".parquet", ["w1", None], {}, "record 2: no text under the key 'text'"),
    "chats": (".jsonl", CHATS, {}, "nor token ids; .* chat_template: true for conversations"),
    "no chats": (".jsonl", ["w1"], {"chat_template": True}, "no text under the key 'messages'"),
    "wrong chats": (
        ".jsonl",
        [[3]],
        {"chat_template": True, "text_field": "text"},
        "no text under the key 'messages'",
    ),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_records_that_cannot_be_read(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    suffix, values, changes, cause = RECORDS[kind]
    file = write_records(tmp_path / f"data{suffix}", "text", values)
    with pytest.raises(InputError, match=cause) as caught:
        drawn(file, Processors(tokenizer=tokenizer), **changes)
    assert str(file) in str(caught.value) and caught.value.remedy


def test_chat_templates_that_cannot_be_used(
    tokenizer: Any, checkpoint: Models, tmp_path: Path
) -> None:
    plain = AutoTokenizer.from_pretrained(checkpoint("llama"))
    file = write_records(tmp_path / "data.jsonl", "messages", CHATS)
    with pytest.raises(InputError, match="tokenizer has no chat template; put its chat_template"):
        drawn(file, Processors(tokenizer=plain), chat_template=True)
    write_records(file, "messages", [[{"role": "user"}], "nothing"])
    with pytest.raises(InputError, match=r"data.jsonl:2: not a conversation; give a list of"):
        drawn(file, Processors(tokenizer=tokenizer), chat_template=True)
    write_records(file, "messages", CHATS)
    plain.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"data.jsonl:1: the chat template fails .*alternate"):
        drawn(file, Processors(tokenizer=plain), chat_template=True)
    (tmp_path / "a.txt").write_text("w1")
    with pytest.raises(InputError, match=r"a .txt holds no conversations"):
        drawn(tmp_path / "a.txt", Processors(tokenizer=tokenizer), chat_template=True)
    wanted = [
        Purpose(name=str(way), path=file, sequence_length=4, num_sequences=1, required=False,
                text_field="messages", chat_template=way)
        for way in (True, False)
    ]  # fmt: skip
    write_records(file, "messages", CHATS)
    with pytest.raises(InputError, match="read with chat_template: true already"):
        draw(wanted, processors=Processors(tokenizer=tokenizer), seed=0)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("a.csv", 'text\n"w1', r"a.csv:\d: not valid CSV"),
        ("a.csv", "text,other\nw1,w2\n\nw3", None),
        ("a.parquet", "nothing", "cannot be read as parquet"),
        ("a.npz", "nothing", r"cannot be read as \.npz"),
    ],
)
def test_damaged_tables(
    name: str, content: str, cause: str | None, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    own = Processors(tokenizer=tokenizer)
    if cause is None:
        assert drawn(tmp_path / name, own, sequence_length=2, num_sequences=1).population == 1
        return
    with pytest.raises(InputError, match=cause):
        drawn(tmp_path / name, own)


RECORDED: dict[str, tuple[str, str, Callable[[Any], list[Any]], dict[str, Any]]] = {
    "csv": ("a.csv", "body", lambda _: TEXTS, {"text_field": "body"}),
    "parquet": ("a.parquet", "text", lambda _: TEXTS, {}),
    "conversations": ("a.jsonl", "messages", lambda _: CHATS, {"chat_template": True}),
    "token ids": (
        "a.jsonl",
        "ids",
        lambda tokenizer: [tokenizer(text)["input_ids"] for text in TEXTS],
        {"text_field": "ids"},
    ),
}


@pytest.mark.parametrize("kind", RECORDED)
def test_records_are_compressed_with(
    kind: str, tokenizer: Any, checkpoint: Models, tmp_path: Path
) -> None:
    name, field, values, settings = RECORDED[kind]
    model = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    tokenizer.save_pretrained(model)
    file = write_records(tmp_path / name, field, values(tokenizer))
    text = {"name": "rest", "path": str(file), "part": [0.6, 1.0], "num_sequences": 3, **settings}
    changes = {"model.path": str(model), "calibration.path": str(file), "evaluation": [text]}
    changes |= {f"calibration.{key}": value for key, value in settings.items()}
    changes |= {"calibration.num_sequences": 5, "calibration.sequence_length": 16}
    output, report = pico.compressed(tmp_path, changes)
    assert report["quality"][0]["num_sequences"] == 3 and "perplexity_after" in report["quality"][0]
    assert pico.factorised_keys(pico.read_state(output))
    ended = pico.call("verify", output, "--against", model)
    assert ended.code == 0 and "data.drawn: 2 hold" in ended.out, ended.out


# ---------------------------------------------------------------- tensors


def test_npz_and_safetensors_are_the_same(tmp_path: Path) -> None:
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    tensors = {"x": x, "attention_mask": torch.arange(60).reshape(20, 3)}
    save_file(tensors, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **{name: t.numpy() for name, t in tensors.items()})
    np.savez_compressed(tmp_path / "b.npz", x=x.numpy().astype(">f4"),
                        attention_mask=np.arange(60, dtype=np.uint16).reshape(20, 3))  # fmt: skip
    hashes = {drawn(tmp_path / name, Processors()).sha256 for name in
              ("a.safetensors", "a.npz", "b.npz")}  # fmt: skip
    assert len(hashes) == 1
    np.savez(tmp_path / "c.npz", x=np.array(["a", "b"]))
    with pytest.raises(InputError, match="x holds <U1, no numbers"):
        drawn(tmp_path / "c.npz", Processors())
    np.savez(tmp_path / "d.npz", x=np.array([{}]))
    with pytest.raises(InputError, match="x holds object, no numbers"):
        drawn(tmp_path / "d.npz", Processors())


def test_masked_inputs_in_npz(
    plain_folder: pico.PlainFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_folder.path)
    state = pico.read_state(plain_folder.path / "masked.safetensors")
    np.savez(tmp_path / "masked.npz", **{name: t.numpy() for name, t in state.items()})
    changes = plain_folder.model("attention") | {"calibration.part": None}
    first, _ = pico.compressed(tmp_path, changes)
    changes |= {
        "calibration.path": str(tmp_path / "masked.npz"),
        "output.path": str(tmp_path / "b"),
    }
    second, _ = pico.compressed(tmp_path, changes)
    wanted, found = pico.read_state(first), pico.read_state(second)
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


@pytest.mark.parametrize(
    "suffix", [".TXT", ".Txt", ".JSONL", ".Csv", ".PARQUET", ".NPZ", ".SafeTensors"]
)
def test_large_letters_in_a_suffix_change_nothing(
    suffix: str, tokenizer: Any, tmp_path: Path
) -> None:
    small = tmp_path / f"data{suffix.lower()}"
    rows = torch.arange(24).reshape(6, 4)
    if suffix == ".NPZ":
        np.savez(small, input_ids=rows.numpy())
    elif suffix == ".SafeTensors":
        save_file({"input_ids": rows}, small)
    elif suffix.lower() == ".txt":
        small.write_text(" ".join(TEXTS))
    else:
        write_records(small, "text", TEXTS)
    shutil.copyfile(small, tmp_path / f"copy{suffix}")
    own = Processors(tokenizer=tokenizer)
    assert drawn(tmp_path / f"copy{suffix}", own).sha256 == drawn(small, own).sha256
