"""Long texts are read in passages; a reference that holds the whole text says which these are."""

import json
import math
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from data_helpers import write_records
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import Models
from transformers import AutoTokenizer

from lrc_cli.data import passages, records
from lrc_cli.data.draw import SPARE, Purpose, draw
from lrc_cli.data.passages import (
    Extent,
    extent_for,
    pieces_of_ids,
    pieces_of_records,
    pieces_of_text,
    read_passages,
)
from lrc_cli.data.processors import Processors
from lrc_cli.data.records import read_records, read_text, stream_text
from lrc_cli.errors import InputError

PIECE, AHEAD, MOST = 64, 16, 8


class Numbers:
    """A tokenizer of numbers, each its own token, which notes what it is given."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        self.given.append(text)
        return {"input_ids": [int(word) for word in text.split()]}


class Characters(Numbers):
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        self.given.append(text)
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Makes pieces so small that a few hundred characters are a long text."""
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"PIECE": PIECE, "AHEAD": AHEAD, "PIECE_IDS": 16, "MOST_PIECES": MOST}
        for name, value in sizes.items():
            patch.setattr(passages, name, value)
        yield


def purpose(path: Path, name: str = "calibration", **changes: Any) -> Purpose:
    values = {"sequence_length": 4, "num_sequences": 4, "required": False}
    return Purpose(name=name, path=path, **{**values, **changes})


def numbers(count: int, first: int = 1000) -> str:
    return " ".join(str(first + i) for i in range(count))


# ---------------------------------------------------------------- the reference


def reference_pieces(text: str) -> list[str]:
    """The rule in docs/inputs.md, character by character."""
    found = []
    while len(text) > PIECE + AHEAD:
        white = [
            i
            for i in range(PIECE, PIECE + AHEAD + 1)
            if text[i].isspace() and not text[i - 1].isspace()
        ]
        single = [i for i in white if text[i] == " " and i < PIECE + AHEAD]
        single = [i for i in single if not text[i + 1].isspace()]
        cut = (single or white or [PIECE])[0]
        found.append(text[:cut])
        text = text[cut:]
    return [*found, text] if text else found


def reference_passages(pieces: list[Any], extent: Extent) -> tuple[list[list[Any]], int]:
    whole = [pieces[i : i + extent.pieces] for i in range(0, len(pieces), extent.pieces)]
    one_in = 1
    while len(whole) // one_in > extent.passages:
        one_in *= 2
    return [x for i, x in enumerate(whole, start=1) if i % one_in == 0], one_in


def reference_blocks(lists: list[list[int]], wanted: Purpose) -> list[list[int]]:
    """The positions of every block of a purpose's part, among all tokens of the passages."""
    stream = [number for number, tokens in enumerate(lists) for _ in tokens]
    first, last = (int(share * len(stream)) for share in wanted.part)
    width = wanted.sequence_length
    found: list[list[int]] = []
    for number in range(len(lists)):
        own = [position for position in range(first, last) if stream[position] == number]
        rows = [own[i : i + width] for i in range(0, len(own), width)]
        found += [row for row in rows if len(row) == width]
    return found


def reference_passages_for(text: str, purposes: list[Purpose]) -> list[list[int]]:
    """The tokens of the passages that are read for some purposes; one list is the whole text."""
    extent = extent_for(max(x.sequence_length for x in purposes))
    needed = SPARE * sum(x.num_sequences * x.sequence_length for x in purposes)
    while True:
        kept, one_in = reference_passages(reference_pieces(text), extent)
        lists = [[int(word) for word in "".join(passage).split()] for passage in kept]
        if one_in == 1:
            return [[token for tokens in lists for token in tokens]]
        room = min(x.sequence_length * len(reference_blocks(lists, x)) for x in purposes)
        if room >= needed:
            return lists
        extent = extent.times(2 ** math.ceil(math.log2(needed / room)) if room else 8)


def reference_draw(
    text: str, purposes: list[Purpose], seed: int
) -> dict[str, tuple[list[list[int]], int]]:
    """Rows and population of every purpose, from the whole text."""
    lists = reference_passages_for(text, purposes)
    stream = [token for tokens in lists for token in tokens]
    taken: set[int] = set()
    drawn = {}
    for wanted in purposes:
        free = [row for row in reference_blocks(lists, wanted) if not taken & set(row)]
        order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = [free[i] for i in order[: wanted.num_sequences]]
        taken |= {position for row in chosen for position in row}
        if chosen:
            drawn[wanted.name] = ([[stream[p] for p in row] for row in chosen], len(free))
    return drawn


texts = st.text(
    st.sampled_from([*"ab \n\t", "é", "漢", "\U0001f600", "\u0301", "\u00a0", "\u2028"]),
    max_size=600,
)


@given(text=texts, cuts=st.lists(st.integers(0, 600), max_size=9))
def test_pieces_are_those_of_the_whole_text_however_it_arrives(text: str, cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), 600]
    arriving = [text[a:b] for a, b in pairwise(ends)]
    found = list(pieces_of_text(arriving))
    assert found == reference_pieces(text) and "".join(found) == text
    assert all(PIECE <= len(piece) <= PIECE + AHEAD for piece in found[:-1])
    assert all(0 < len(piece) <= PIECE + AHEAD for piece in found[-1:])


@given(count=st.integers(0, 300), pieces=st.integers(1, 5), most=st.integers(1, 9))
def test_every_kth_passage_is_read_and_k_is_the_least_power_of_two(
    count: int, pieces: int, most: int
) -> None:
    extent = Extent(pieces=pieces, passages=most)
    found = read_passages(iter(range(count)), extent)
    kept = list(map(list, found))
    assert (kept, found.one_in) == reference_passages(list(range(count)), extent)
    # What is read of a file is also read where more is read.
    more = list(map(list, read_passages(iter(range(count)), extent.times(4))))
    assert all(passage in more for passage in kept)


parts = st.tuples(st.integers(0, 20), st.integers(0, 20)).filter(lambda ab: ab[0] != ab[1])
wishes = st.lists(st.tuples(parts, st.integers(1, 30), st.integers(1, 12)), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    wishes=wishes,
    count=st.integers(30, 3000),
    seed=st.integers(0, 3),
    separators=st.lists(st.sampled_from([" ", "\n", "\n\n", "  ", "\t"]), min_size=1, max_size=9),
)
def test_the_draw_is_that_of_the_whole_text_in_memory(
    tmp_path_factory: pytest.TempPathFactory,
    wishes: list[tuple[tuple[int, int], int, int]],
    count: int,
    seed: int,
    separators: list[str],
) -> None:
    text = "".join(f"{1000 + i}{separators[i % len(separators)]}" for i in range(count))
    file = tmp_path_factory.getbasetemp() / "random.txt"
    file.write_text(text)
    purposes = [
        purpose(
            file,
            str(i),
            part=(min(part) / 20, max(part) / 20),
            sequence_length=length,
            num_sequences=number,
        )
        for i, (part, length, number) in enumerate(wishes)
    ]
    drawn = draw(purposes, processors=Processors(tokenizer=Numbers()), seed=seed)
    found = {name: (x.inputs["input_ids"].tolist(), x.population) for name, x in drawn.items()}
    assert found == reference_draw(text, purposes, seed)
    rows = [row for listed, _ in found.values() for row in listed]
    assert all(row == list(range(row[0], row[0] + len(row))) for row in rows), "not contiguous"
    tokens = [token for row in rows for token in row]
    assert len(tokens) == len(set(tokens)), "a token was drawn twice"


# ---------------------------------------------------------------- what is read


def test_a_long_text_is_read_in_passages_that_lie_evenly_over_it(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text(numbers(8000))
    tokenizer = Numbers()
    drawn = draw(
        [purpose(file, num_sequences=8)], processors=Processors(tokenizer=tokenizer), seed=0
    )["calibration"]
    # The text has 616 pieces, so 154 passages of 4 pieces. Two passages hold fewer than four times
    # the tokens that are asked for, so up to 8 are read.
    assert extent_for(4) == Extent(pieces=4, passages=2)
    assert drawn.one_in == 32
    sampled = [text for text in tokenizer.given if len(text) <= PIECE + AHEAD]
    assert len(sampled) == 2 * 4 + 4 * 4
    assert sum(map(len, tokenizer.given)) < 40_000 / 4, "tokenised, samples included"
    starts = sorted({int(text.split()[0]) for text in sampled})
    assert starts[0] < 3000 and starts[-1] > 7000, "they do not lie over the whole text"
    population = draw(
        [purpose(file, num_sequences=8), purpose(file, "rest", num_sequences=10**6)],
        processors=Processors(tokenizer=Numbers()),
        seed=0,
    )
    assert population["calibration"].one_in is None, "a million blocks were asked for"
    assert len(population["calibration"]) + len(population["rest"]) == 2000


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    peaks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "CHUNK", 1 << 12)
        for count in (20_000, 320_000):
            file = tmp_path / f"{count}.txt"
            file.write_text(numbers(count, first=10**6))
            tracemalloc.start()
            found = read_passages(pieces_of_text(stream_text(file)), extent_for(4))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert len(found) <= MOST
    # zlib takes 270 kB for itself; the longer text has 2.6 MB.
    assert max(peaks) < 400_000 and peaks[1] < 1.5 * peaks[0], peaks


def test_more_is_read_where_a_small_part_would_lack_sequences(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text(numbers(8000))
    wanted = [
        purpose(file, part=(0.0, 0.02), num_sequences=30, required=True),
        purpose(file, "rest", part=(0.02, 1.0), num_sequences=30, required=True),
    ]
    drawn = draw(wanted, processors=Processors(tokenizer=Numbers()), seed=0)
    rows = drawn["calibration"].inputs["input_ids"]
    assert len(rows) == 30 and int(rows.max()) <= 1000 + 0.02 * 8000
    assert int(drawn["rest"].inputs["input_ids"].min()) > int(rows.max())


def test_a_sequence_longer_than_a_piece_lies_in_one_passage(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text(numbers(30_000))
    drawn = draw(
        [purpose(file, sequence_length=200, num_sequences=3, required=True)],
        processors=Processors(tokenizer=Numbers()),
        seed=0,
    )["calibration"]
    assert drawn.one_in is not None
    for row in drawn.inputs["input_ids"].tolist():
        assert row == list(range(row[0], row[0] + 200))


@pytest.mark.parametrize(
    "text",
    [
        "ACGT" * 5000,
        "漢字かな交じり文" * 2500,
        "\U0001f600e\u0301" * 5000,
        "a\n" * 9000,
        "ab\r\n" * 5000,
    ],
    ids=["no white space", "no white space, 3 bytes", "4 bytes and combining", "lines", "CRLF"],
)
def test_texts_without_spaces(text: str, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_bytes(text.encode())
    read = text.replace("\r\n", "\n")
    wanted = [
        purpose(file, part=(0.0, 0.7), sequence_length=16),
        purpose(file, "rest", part=(0.7, 1.0), sequence_length=16),
    ]
    tokenizer = Characters()
    drawn = draw(wanted, processors=Processors(tokenizer=tokenizer), seed=0)
    for found in drawn.values():
        assert len(found) == 4 and found.one_in is not None
        for row in found.inputs["input_ids"].tolist():
            assert tokenizer.decode(row) in read
    again = draw(wanted, processors=Processors(tokenizer=Characters()), seed=0)
    assert [x.sha256 for x in again.values()] == [x.sha256 for x in drawn.values()]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_records_are_read_in_the_passages_of_one_text(suffix: str, tmp_path: Path) -> None:
    rows = [numbers(7 + i % 5, first=1000 + 20 * i) for i in range(500)]
    rows[40] = rows[41] = ""
    (tmp_path / "all.txt").write_text("\n\n".join(rows))
    file = write_records(tmp_path / f"data{suffix}", "text", rows)
    one, other = (
        draw([purpose(path)], processors=Processors(tokenizer=Numbers()), seed=0)["calibration"]
        for path in (file, tmp_path / "all.txt")
    )
    assert one.one_in == other.one_in is not None
    assert (one.sha256, one.population) == (other.sha256, other.population)
    assert one.findings.empty_records == 2


def test_token_ids_are_read_in_passages(tmp_path: Path) -> None:
    rows = [list(range(10 * i, 10 * i + 10)) for i in range(400)]
    file = write_records(tmp_path / "ids.jsonl", "text", rows)
    drawn = draw([purpose(file)], processors=Processors(), seed=0)["calibration"]
    assert drawn.one_in is not None and drawn.population < 4000 // 4
    for row in drawn.inputs["input_ids"].tolist():
        assert row == list(range(row[0], row[0] + 4))
    assert [len(piece) for piece in pieces_of_ids([[1] * 20, [], [2] * 13])] == [16, 16, 1]


def test_conversations_are_read_in_passages_of_whole_conversations(
    checkpoint: Models, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    chats = [[{"role": "user", "content": pico.words(9, seed=i)}] for i in range(300)]
    file = write_records(tmp_path / "chats.jsonl", "messages", chats)
    drawn = draw(
        [purpose(file, chat_template=True)], processors=Processors(tokenizer=tokenizer), seed=0
    )["calibration"]
    assert drawn.one_in is not None
    assert drawn.findings.turns.total < 300, "every conversation was rendered"
    moved = tmp_path / "a folder with a longer name" / "and another name.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(file.read_bytes())
    again = draw(
        [purpose(moved, chat_template=True)], processors=Processors(tokenizer=tokenizer), seed=0
    )["calibration"]
    assert again.sha256 == drawn.sha256, "the path decided where passages lie"
    every = [tokenizer(chat[0]["content"])["input_ids"] for chat in chats]
    stream = [token for ids in every for token in ids]
    blocks = [stream[i : i + 4] for i in range(len(stream) - 3)]
    assert all(row in blocks for row in drawn.inputs["input_ids"].tolist())
    assert sum(map(len, pieces_of_records(("a", chat) for chat in chats))) == 300


def test_a_file_of_another_kind_further_on_is_noticed(tmp_path: Path) -> None:
    rows: list[Any] = [numbers(9)] * 300
    file = write_records(tmp_path / "data.jsonl", "text", [*rows, [1, 2]])
    with pytest.raises(InputError, match=r"jsonl:301: 'text' holds token ids, and text before"):
        draw([purpose(file)], processors=Processors(tokenizer=Numbers()), seed=0)


# ---------------------------------------------------------------- chunks of bytes


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64])
def test_a_text_is_the_same_in_chunks_of_any_size(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "CHUNK", chunk)
    text = "a\r\nb\rc\n\r\n é漢\U0001f600 e\u0301\u2028\u0085d\r"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode() * 3)
    wanted = (text * 3).replace("\r\n", "\n").replace("\r", "\n")
    assert read_text(tmp_path / "a.txt") == "".join(stream_text(tmp_path / "a.txt")) == wanted


@pytest.mark.parametrize("chunk", [1, 2, 3, 1 << 12])
@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"caf\xe9 au lait", 1),
        ("é\n漢\n".encode() + b"\xff", 3),
        (b"a\n" * 9000 + b"\xe2\x82", 9001),
        (b"\n\n\xe2\x82a", 3),
        ("a\n".encode("utf-16"), 1),
    ],
    ids=["latin 1", "after other lines", "cut short at the end", "broken inside", "UTF-16"],
)
def test_the_first_line_that_is_not_utf8_is_named(
    content: bytes, line: int, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "CHUNK", chunk)
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.txt:{line}: not UTF-8 text"):
        draw([purpose(tmp_path / "a.txt")], processors=Processors(tokenizer=Numbers()), seed=0)
    with pytest.raises(InputError, match=r"not UTF-8 text|not valid JSON"):
        list(read_records(tmp_path / "a.jsonl", "text"))


# ---------------------------------------------------------------- what is said of it


def test_report_certificate_and_verify_know_that_passages_were_read(
    checkpoint: Models, tmp_path: Path
) -> None:
    file = tmp_path / "long.txt"
    file.write_text(pico.words(30_000))
    changes = {
        "calibration.path": str(file),
        "calibration.part": [0.0, 0.5],
        "calibration.num_sequences": 5,
        "calibration.sequence_length": 16,
        "certification": {"part": [0.5, 1.0], "num_sequences": 4},
        "model.path": str(checkpoint("llama")),
    }
    ended = pico.call("compress", pico.job(tmp_path, changes))
    assert ended.code == 0, ended.err
    output = Path(ended.out.strip())
    report = json.loads((output / "report.json").read_text())
    certified = report["provenance"]["sequences"]["certification"]
    population = report["certificate"]["population"]
    one_in = certified["one_in"]
    assert one_in in (4, 8, 16, 32, 64)
    said = f"certification: the text is long, and one passage in {one_in} of it is read; 4 of"
    assert f"{said} {certified['population']:,} sequences are drawn" in ended.err
    assert population["size"] == certified["population"]
    size, where = certified["population"], f"one passage in {one_in} of long.txt (part 0.5 to 1)"
    assert population["description"] == (
        f"the {size:,} blocks of 16 tokens of {where} that calibration left free"
    )
    assert population["description"] in (output / "README.md").read_text()
    ended = pico.call("verify", output, "--against", checkpoint("llama"))
    assert ended.code == 0 and "data.drawn: 3 hold" in ended.out, ended.out
    report["provenance"]["sequences"]["certification"]["one_in"] = 2 * one_in
    (output / "report.json").write_text(json.dumps(report))
    ended = pico.call("verify", output, "--against", checkpoint("llama"))
    assert ended.code != 0 and "data.drawn" in ended.out, ended.out
