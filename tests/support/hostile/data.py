"""Hostile data: texts, records, tables, archives of arrays, tensors and folders."""

import functools
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pico
import torch
from safetensors.torch import save, save_file

from hostile.checkpoints import PAGE, Runs, Table, bound_socket, instead, link, pipe, write
from hostile.harness import Case, Spoil, write_job

WORDS = pico.words(2000).split()


def job(**changes: object) -> Spoil:
    """The config has other values; two underscores in a name stand for a dot."""
    return lambda room: write_job(room, **changes)


def file(name: str, content: str | bytes, **changes: object) -> Spoil:
    """The calibration data are a file with this content."""

    def spoil(room: Path) -> None:
        write(name, content)(room)
        write_job(room, calibration__path=name, calibration__part=None, **changes)

    return spoil


def made(name: str, make: Callable[[Path], None], **changes: object) -> Spoil:
    """The calibration data are something that `make` makes."""

    def spoil(room: Path) -> None:
        instead(name, make)(room)
        write_job(room, calibration__path=name, calibration__part=None, **changes)

    return spoil


def lines(change: Callable[[int, str], Any]) -> str:
    """Returns records of 40 words each, one a line; `change` returns record 7."""
    texts = [" ".join(WORDS[40 * i : 40 * i + 40]) for i in range(40)]
    rows: list[Any] = [{"text": text} for text in texts]
    rows[7] = change(7, texts[7])
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


def record(value: Any, **changes: object) -> Spoil:
    """A file of records, the eighth with this value for its text."""
    return file("data.jsonl", lines(lambda _, __: {"text": value}), **changes)


def line(content: str) -> Spoil:
    """A file of records, the eighth with this content for its line."""
    return file("data.jsonl", lines(lambda _, __: content))


TEXTS: Table = {
    "that is missing": (job(calibration__path="absent.txt"), ("absent.txt", "no such file")),
    "that is empty": (write("text.txt", ""), ("text.txt", "empty")),
    "of white space": (write("text.txt", " \n\t\r\n" * 500), ("text.txt",)),
    "of one word": (write("text.txt", "w1"), ("text.txt",)),
    "one word too short": (write("text.txt", " ".join(WORDS[:31])), ("text.txt",)),
    "of NULs": (write("text.txt", bytes(5000)), ("text.txt",)),
    "of random bytes": (write("text.txt", bytes(range(256)) * 20), ("text.txt", "UTF-8")),
    "in UTF-16": (write("text.txt", " ".join(WORDS).encode("utf-16")), ("text.txt", "UTF-8")),
    "in latin-1": (write("text.txt", b"caf\xe9 " * 500), ("text.txt", "UTF-8")),
    "cut in a character": (write("text.txt", b"w1 " * 900 + b"\xe2\x82"), ("text.txt", "UTF-8")),
    "that is a directory": (instead("text.txt", os.mkdir), ("text.txt",)),
    "that is a pipe": (instead("text.txt", pipe), ("text.txt",)),
    "that is a socket": (instead("text.txt", bound_socket), ("text.txt",)),
    "that is a device": (instead("text.txt", link("/dev/zero")), ("text.txt",)),
    "that is a device without end": (instead("text.txt", link("/dev/urandom")), ("text.txt",)),
    "that is an empty device": (instead("text.txt", link("/dev/null")), ("text.txt",)),
    "that is a loop of links": (instead("text.txt", link("text.txt")), ("text.txt",)),
    "that is a link to nothing": (instead("text.txt", link("nowhere.txt")), ("text.txt",)),
    "of another kind": (file("data.pdf", "%PDF-1.7"), ("data.pdf",)),
    "without a suffix": (file("data", "w1 w2"), ("data",)),
    "in capital letters": (file("data.DOC", " ".join(WORDS)), ("data.DOC",)),
    "that is compressed": (file("data.txt.gz", b"\x1f\x8b\x08\x00"), ("data.txt.gz",)),
    "with an escape as name": (job(calibration__path="\x1b[2J.txt"), ("no such file",)),
    "with a long name": (job(calibration__path="d" * 5000 + ".txt"), ("calibration",)),
    "with a long name of a part": (job(calibration__path="d" * 300 + ".txt"), ("calibration",)),
    "that is the root": (job(calibration__path="/", calibration__part=None), ("/",)),
    "that is the checkpoint": (job(calibration__path="model"), ("model",)),
    "that is the config": (job(calibration__path="job.yaml"), ("job.yaml",)),
    "in a part that is too small": (job(calibration__part=[0.0, 0.01]), ("text.txt",)),
    "in a part of nothing": (job(calibration__part=[0.0, 1e-300]), ("text.txt",)),
    "in long sequences": (job(calibration__sequence_length=65), ("64 positions",)),
    "in sequences of 10^9": (job(calibration__sequence_length=10**9), ("text.txt", "blocks")),
    "in many sequences": (job(calibration__num_sequences=10**9), ("text.txt", "were asked for")),
    "for a certificate without end": (
        job(certification={"num_sequences": 10**9}),
        ("text.txt", "were asked for"),
    ),
    "for an evaluation that is missing": (
        job(evaluation=[{"name": "held", "path": "absent.txt"}]),
        ("absent.txt", "no such file"),
    ),
    "as conversations": (job(calibration__chat_template=True), ("text.txt",)),
}
"""What is wrong with a text, and what the message says."""

JSONL = "data.jsonl"
RECORDS: Table = {
    "no JSON": (line("{text"), (f"{JSONL}:8", "JSON")),
    "a list": (line("[1, 2]"), (f"{JSONL}:8",)),
    "a number": (line("7"), (f"{JSONL}:8",)),
    "null": (line("null"), (f"{JSONL}:8",)),
    "a text": (line('"w1 w2"'), (f"{JSONL}:8",)),
    "an empty object": (line("{}"), (f"{JSONL}:8", "'text'")),
    "two objects": (line('{"text": "a"} {"text": "b"}'), (f"{JSONL}:8", "JSON")),
    "an object cut short": (line('{"text": "w1'), (f"{JSONL}:8", "JSON")),
    "5000 digits": (line('{"text": ' + "9" * 5000 + "}"), (f"{JSONL}:8",)),
    "lists in lists": (line('{"text": ' + "[" * 100_000), (f"{JSONL}:8",)),
    "another field": (line('{"body": "w1"}'), (f"{JSONL}:8", "'body'")),
    "a field with an escape": (line('{"\\u001b[2J": "w1"}'), (f"{JSONL}:8",)),
    "a null field": (record(None), (f"{JSONL}:8", "'text'")),
    "a number as text": (record(7), (f"{JSONL}:8",)),
    "true as text": (record(True), (f"{JSONL}:8",)),
    "an object as text": (record({"a": 1}), (f"{JSONL}:8",)),
    "a list of texts": (record(["w1", "w2"]), (f"{JSONL}:8",)),
    "a list of fractions": (record([1.5, 2.5]), (f"{JSONL}:8",)),
    "a list of lists": (record([[1]]), (f"{JSONL}:8",)),
    "a list with true": (record([True, 1]), (f"{JSONL}:8",)),
    "a list with null": (record([None]), (f"{JSONL}:8",)),
    "a negative token": (record([1, -5]), (JSONL,)),
    "a token of 30 digits": (record([10**30]), (JSONL,)),
    "a lone surrogate": (record("\ud800 w1"), (f"{JSONL}:8",)),
    "another field's name": (
        file(JSONL, lines(lambda i, t: {"text": t}), calibration__text_field="body"),
        (f"{JSONL}:1", "'body'"),
    ),
    "no records": (file(JSONL, ""), (JSONL,)),
    "blank lines": (file(JSONL, "\n\n  \n"), (JSONL,)),
    "one array": (file(JSONL, json.dumps([{"text": "w1"}] * 9)), (f"{JSONL}:1",)),
    "an array on many lines": (file(JSONL, json.dumps([{"text": "w1"}], indent=1)), (JSONL,)),
    "UTF-16": (file(JSONL, '{"text": "a"}'.encode("utf-16")), (JSONL, "UTF-8")),
    "random bytes": (file(JSONL, bytes(range(256))), (JSONL, "UTF-8")),
    "conversations that are texts": (
        file(JSONL, lines(lambda _, t: {"text": t}), calibration__chat_template=True),
        (JSONL,),
    ),
    "conversations of numbers": (
        file(JSONL, '{"messages": [1, 2]}\n' * 40, calibration__chat_template=True),
        (JSONL,),
    ),
    "conversations without turns": (
        file(JSONL, '{"messages": []}\n' * 40, calibration__chat_template=True),
        (JSONL,),
    ),
}
"""What is wrong with a record or a file of records, and what the message says."""

COLUMN = "".join(f'"{" ".join(WORDS[40 * i : 40 * i + 40])}"\n' for i in range(40))
CSV = "data.csv"
TABLES: Table = {
    "empty": (file(CSV, ""), (CSV,)),
    "a header only": (file(CSV, "text\n"), (CSV,)),
    "another column": (file(CSV, f"body\n{COLUMN}"), (CSV, "'body'")),
    "the column twice": (file(CSV, "text,text\n" + "w1 w2 w3,w4 w5 w6\n" * 400), (CSV, "text")),
    "an open quote": (file(CSV, f'text\n"{"w1 " * 40}\n'), (CSV,)),
    "a quote in a field": (file(CSV, 'text\n"a"b"\n'), (f"{CSV}:2",)),
    "a short row": (file(CSV, f"name,text\na,b\nc\n{COLUMN}"), (f"{CSV}:3",)),
    "NULs": (file(CSV, b"text\n" + bytes(500)), (CSV,)),
    "UTF-16": (file(CSV, f"text\n{COLUMN}".encode("utf-16")), (CSV, "UTF-8")),
    "a column with an escape": (file(CSV, f'"\x1b[2J"\n{COLUMN}'), (CSV, "'text'")),
    "random bytes": (file(CSV, bytes(range(256))), (CSV, "UTF-8")),
}
"""What is wrong with a .csv file, and what the message says."""


def parquet(columns: Mapping[str, Any], **changes: object) -> Spoil:
    """The calibration data are a parquet file."""

    def spoil(room: Path) -> None:
        import pyarrow
        from pyarrow.parquet import write_table

        write_table(pyarrow.table(dict(columns)), room / "data.parquet")
        write_job(room, calibration__path="data.parquet", calibration__part=None, **changes)

    return spoil


def cut_parquet(room: Path) -> None:
    """The parquet file ends early."""
    parquet({"text": ["w1 " * 40] * 40})(room)
    os.truncate(room / PARQUET, (room / PARQUET).stat().st_size - 20)


PARQUET = "data.parquet"
PARQUETS: Table = {
    "no bytes": (file(PARQUET, ""), (PARQUET,)),
    "a text": (file(PARQUET, "PAR1 hello PAR1"), (PARQUET,)),
    "a length without end": (file(PARQUET, b"PAR1\xff\xff\xff\x7fPAR1"), (PARQUET,)),
    "a page of a web site": (file(PARQUET, PAGE), (PARQUET,)),
    "no end": (cut_parquet, (PARQUET,)),
    "another column": (parquet({"body": ["w1"] * 40}), (PARQUET, "'body'")),
    "no rows": (parquet({"text": []}), (PARQUET,)),
    "a null": (parquet({"text": ["w1", None]}), (PARQUET, "record 2")),
    "numbers": (parquet({"text": [1, 2]}), (PARQUET, "record 1")),
    "bytes": (parquet({"text": [b"w1"]}), (PARQUET, "record 1")),
    "lists of texts": (parquet({"text": [["w1"]]}), (PARQUET, "record 1")),
    "objects": (parquet({"text": [{"a": 1}]}), (PARQUET, "record 1")),
    "negative tokens": (parquet({"text": [[1, -1] * 20] * 40}), ("calibration", "-1")),
}
"""What is wrong with a .parquet file, and what the message says."""

# ---------------------------------------------------------------- arrays

IDS = np.tile(np.arange(5, 37), (40, 1))


def npy(array: Any, **options: Any) -> bytes:
    """Returns the bytes of an array as numpy stores them."""
    held = io.BytesIO()
    np.save(held, array, **options)
    return held.getvalue()


def npz(members: Mapping[str, bytes]) -> Spoil:
    """The calibration data are a zip with these members."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file("data.npz", held.getvalue())


def arrays(**values: Any) -> Spoil:
    """The calibration data are an archive of arrays."""
    return npz({f"{name}.npy": npy(np.asarray(value)) for name, value in values.items()})


def claims(shape: str, dtype: str = "<i8") -> Spoil:
    """The calibration data are an array whose header claims a shape."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    head = text.ljust(117) + "\n"
    raw = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + bytes(64)
    return npz({"input_ids.npy": raw})


def code_in_an_array() -> Spoil:
    """The calibration data are an array of objects, whose pickle runs code."""
    array = np.empty(1, object)
    array[0] = Runs()
    return npz({"input_ids.npy": npy(array, allow_pickle=True)})


NPZ = "data.npz"
ARRAYS: Table = {
    "no bytes": (file(NPZ, ""), (NPZ,)),
    "a text": (file(NPZ, "hello"), (NPZ,)),
    "a pickle that runs code": (file(NPZ, b"cposix\nsystem\n(S'touch ran'\ntR."), (NPZ,)),
    "an array of objects that run code": (code_in_an_array(), (NPZ,)),
    "an array and no archive": (file(NPZ, npy(IDS)), (NPZ,)),
    "an archive of nothing": (npz({}), (NPZ,)),
    "a member that is no array": (npz({"a.txt": b"hello"}), (NPZ,)),
    "a member of no bytes": (npz({"input_ids.npy": b""}), (NPZ,)),
    "a member cut short": (npz({"input_ids.npy": npy(IDS)[:200]}), (NPZ,)),
    "a member with a name above": (npz({"../ran.npy": npy(IDS)}), ("calibration", "../ran")),
    "a member with an escape": (npz({"\x1b[2J.npy": npy(IDS)}), ("calibration",)),
    "a header that is code": (
        npz(
            {"input_ids.npy": b"\x93NUMPY\x01\x00\x20\x00" + b"__import__('os').system('ls')\n" * 9}
        ),
        (NPZ,),
    ),
    "a header of brackets": (
        npz({"input_ids.npy": b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000}),
        (NPZ,),
    ),
    "a header of another version": (npz({"input_ids.npy": b"\x93NUMPY\x09\x00"}), (NPZ,)),
    "a claim of 10^12 rows": (claims("(1000000000000, 8)"), (NPZ,)),
    "a claim of 2^63 rows": (claims("(9223372036854775807, 2)"), (NPZ,)),
    "a claim of minus one row": (claims("(-1, 8)"), (NPZ,)),
    "a shape of texts": (claims("('a', 8)"), (NPZ,)),
    "an unknown dtype": (claims("(1, 8)", "<q9"), (NPZ,)),
    "a dtype of objects": (claims("(1, 8)", "|O"), (NPZ,)),
    "texts": (arrays(input_ids=["a", "b"]), (NPZ, "input_ids")),
    "dates": (arrays(input_ids=np.zeros((40, 8), "M8[s]")), (NPZ, "input_ids")),
    "complex numbers": (arrays(input_ids=np.zeros((40, 8), complex)), (NPZ, "input_ids")),
    "records": (arrays(input_ids=np.zeros(40, [("a", "i4")])), (NPZ, "input_ids")),
    "no rows": (arrays(input_ids=IDS[:0]), (NPZ,)),
    "a single number": (arrays(input_ids=7), (NPZ,)),
    "rows that differ": (arrays(input_ids=IDS, attention_mask=IDS[:9]), (NPZ, "differ")),
    "NaN": (arrays(inputs_embeds=np.full((40, 8, 64), math.nan, np.float32)), (NPZ, "NaN")),
    "fractions as tokens": (arrays(input_ids=IDS + 0.5), ("calibration", "integers")),
    "truth values as tokens": (arrays(input_ids=IDS > 9), ("calibration",)),
    "negative tokens": (arrays(input_ids=IDS - 9), ("calibration", "negative")),
    "tokens beyond the vocabulary": (arrays(input_ids=IDS + 90), ("calibration", "96")),
    "tokens in one row": (arrays(input_ids=IDS[0]), ("calibration", "shape")),
    "tokens of three sides": (arrays(input_ids=IDS[:, :, None]), ("calibration",)),
    "rows of no tokens": (arrays(input_ids=IDS[:, :0]), ("calibration",)),
    "too long rows": (arrays(input_ids=np.tile(IDS, 3)), ("calibration", "64")),
    "a mask of another shape": (
        arrays(input_ids=IDS, attention_mask=IDS[:, :5]),
        ("calibration", "(12, 5)"),
    ),
    "a mask of zeros": (
        arrays(input_ids=IDS, attention_mask=0 * IDS),
        ("calibration", "attention_mask"),
    ),
    "embeddings of another width": (
        arrays(inputs_embeds=np.zeros((40, 8, 5), np.float32)),
        ("calibration",),
    ),
    "huge embeddings": (
        arrays(inputs_embeds=np.full((40, 8, 64), 1e300)),
        ("calibration",),
    ),
}
"""What is wrong with a .npz file, and what the message says."""


def tensors(**values: torch.Tensor) -> Spoil:
    """The calibration data are a file of safetensors."""
    return made("data.safetensors", functools.partial(save_file, values))


GOOD_TENSORS = save({"input_ids": torch.from_numpy(IDS).contiguous()})
TENSORS_FILE = "data.safetensors"
TENSORS: Table = {
    "no bytes": (file(TENSORS_FILE, ""), (TENSORS_FILE,)),
    "a text": (file(TENSORS_FILE, "hello, how are you"), (TENSORS_FILE,)),
    "a header cut short": (file(TENSORS_FILE, GOOD_TENSORS[:40]), (TENSORS_FILE,)),
    "data cut short": (file(TENSORS_FILE, GOOD_TENSORS[:-1]), (TENSORS_FILE,)),
    "a length of 2^63": (file(TENSORS_FILE, b"\0\0\0\0\0\0\0\x80{}"), (TENSORS_FILE,)),
    "no tensors": (file(TENSORS_FILE, save({})), (TENSORS_FILE,)),
    "8-bit floats": (
        tensors(inputs_embeds=torch.zeros(40, 8, 64).to(torch.float8_e4m3fn)),
        ("calibration",),
    ),
    "infinity": (tensors(inputs_embeds=torch.full((40, 8, 64), math.inf)), (TENSORS_FILE, "inf")),
    "no rows": (tensors(input_ids=torch.zeros(0, 8, dtype=torch.long)), (TENSORS_FILE,)),
    "a single number": (tensors(input_ids=torch.tensor(7)), (TENSORS_FILE,)),
    "a pipe": (made(TENSORS_FILE, pipe), (TENSORS_FILE,)),
    "a device": (made(TENSORS_FILE, link("/dev/zero")), (TENSORS_FILE,)),
    "a directory": (made(TENSORS_FILE, os.mkdir), (TENSORS_FILE,)),
}
"""What is wrong with a .safetensors file of data, and what the message says."""


def folder(files: Mapping[str, bytes]) -> Spoil:
    """The calibration data are a folder."""

    def make(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)

    return made("data", make)


FOLDERS: Table = {
    "of nothing": (folder({}), ("data",)),
    "of texts": (folder({"a.txt": b"w1 w2"}), ("data",)),
    "of a damaged image": (folder({"a.png": b"\x89PNG\r\n\x1a\n"}), ("processor",)),
    "of an image that is none": (folder({"a.jpg": b"hello"}), ("processor",)),
    "of a recording that is none": (folder({"a.wav": b"RIFF"}), ("processor",)),
    "of hidden files": (folder({".a.png": b"x"}), ("data",)),
}
"""What is wrong with a folder of data, and what the message says."""


def _of_tables() -> Iterator[Case]:
    tables: dict[str, Table] = {
        "a text": TEXTS,
        "records with": RECORDS,
        "a csv with": TABLES,
        "a parquet with": PARQUETS,
        "an npz with": ARRAYS,
        "a tensor file with": TENSORS,
        "a folder": FOLDERS,
    }
    for what, table in tables.items():
        for name, (spoil, said) in table.items():
            yield Case(name=f"{what} {name}", said=said, spoil=spoil)


CASES = [*_of_tables()]
