"""Sequences of text and rows of tensors are drawn, and no two purposes share a token."""

import json
import random
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import Models
from safetensors.torch import save_file
from transformers import AutoTokenizer

from lrc_cli.data import draw as draw_module
from lrc_cli.data.draw import Purpose, Sequences, draw
from lrc_cli.data.processors import Processors
from lrc_cli.data.rows import Rows
from lrc_cli.errors import InputError


class Counting:
    """A tokenizer of numbers, each its own token; 7 and 8, 9 go around a sequence."""

    def __init__(self, *, wraps: bool = False) -> None:
        self.wraps = wraps

    def __call__(self, text: str, *, add_special_tokens: bool, **_: Any) -> dict[str, list[int]]:
        ids = [1 if word == "a" else int(word) for word in text.split()]
        return {"input_ids": [7, *ids, 8, 9] if self.wraps and add_special_tokens else ids}


COUNTING = Processors(tokenizer=Counting())
WRAPPING = Processors(tokenizer=Counting(wraps=True))


def purpose(path: Path, name: str = "calibration", **changes: Any) -> Purpose:
    values = {"sequence_length": 8, "num_sequences": 4, "required": False}
    return Purpose(name=name, path=path, **{**values, **changes})


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a file with the numbers 1000 ... 1999 in order."""
    file = tmp_path_factory.mktemp("numbers") / "numbers.txt"
    file.write_text(" ".join(str(1000 + i) for i in range(1000)))
    return file


def rows(sequences: Sequences) -> list[list[int]]:
    return sequences.inputs["input_ids"].tolist()


shares = st.tuples(st.integers(0, 20), st.integers(0, 20)).filter(lambda ab: ab[0] != ab[1])
wishes = st.lists(st.tuples(shares, st.integers(4, 90), st.integers(1, 40)), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None)
@given(wishes=wishes, seed=st.integers(0, 5), wraps=st.booleans())
def test_no_token_is_in_two_blocks(
    numbers: Path, wishes: list[tuple[tuple[int, int], int, int]], seed: int, wraps: bool
) -> None:
    purposes = [
        purpose(
            numbers,
            name=str(i),
            part=(min(part) / 20, max(part) / 20),
            sequence_length=length,
            num_sequences=count,
        )
        for i, (part, length, count) in enumerate(wishes)
    ]
    drawn = draw(purposes, processors=Processors(tokenizer=Counting(wraps=wraps)), seed=seed)
    seen: set[int] = set()
    for wanted in purposes:
        for row in rows(drawn[wanted.name]) if wanted.name in drawn else ():
            assert len(row) == wanted.sequence_length
            if wraps:
                assert (row[0], row[-2:]) == (7, [8, 9])
                row = row[1:-2]
            assert row == list(range(row[0], row[0] + len(row))), "a sequence is not contiguous"
            assert 1000 + 1000 * wanted.part[0] - 1 <= row[0]
            assert row[-1] < 1000 + 1000 * wanted.part[1]
            assert not seen & set(row), "a token was drawn twice"
            seen |= set(row)


def test_earlier_purposes_come_first_and_the_rest_is_what_is_left(numbers: Path) -> None:
    wanted = [
        purpose(numbers, "calibration", num_sequences=100),
        purpose(numbers, "evaluation", num_sequences=100),
        purpose(numbers, "more"),
    ]
    drawn = draw(wanted, processors=COUNTING, seed=0)
    assert (len(drawn["calibration"]), len(drawn["evaluation"])) == (100, 25)
    assert drawn["calibration"].population == 125 and drawn["evaluation"].population == 25
    assert "more" not in drawn


def test_a_longer_sequence_skips_what_a_shorter_one_took(numbers: Path) -> None:
    one = purpose(numbers, "one", part=(0.5, 0.51), sequence_length=10, num_sequences=1)
    other = purpose(numbers, "other", sequence_length=100, num_sequences=100)
    drawn = draw([one, other], processors=COUNTING, seed=0)
    assert rows(drawn["one"])[0][0] == 1500
    assert len(drawn["other"]) == 9, "the sequence of 1500 ... 1599 is taken"


def test_the_draw_depends_on_the_seed_alone(numbers: Path) -> None:
    def sequences(seed: int) -> Sequences:
        return draw([purpose(numbers)], processors=COUNTING, seed=seed)["calibration"]

    assert rows(sequences(0)) == rows(sequences(0)) and sequences(0).sha256 == sequences(0).sha256
    assert rows(sequences(0)) != rows(sequences(1)) and sequences(0).sha256 != sequences(1).sha256
    starts = [row[0] for row in rows(sequences(0))]
    assert starts != sorted(starts), "the sequences are not permuted"


def test_a_purpose_can_have_a_draw_of_its_own(numbers: Path) -> None:
    def order(name: str, part: tuple[float, float], own: bool) -> list[int]:
        wanted = purpose(numbers, name, part=part, num_sequences=40, own_draw=own)
        drawn = draw([wanted], processors=COUNTING, seed=0)[name]
        starts = [row[0] for row in rows(drawn)]
        return [start - min(starts) for start in starts]

    halves = (0.0, 0.5), (0.5, 1.0)
    shared = [order("one", halves[0], False), order("two", halves[1], False)]
    assert shared[0] == shared[1], "as many free sequences: one permutation"
    own = [order("one", halves[0], True), order("two", halves[1], True)]
    assert own[0] != own[1] and shared[0] not in own
    assert own[0] == order("one", halves[0], True), "yet the seed and the name decide it"


def test_two_names_of_one_file_are_one_file(numbers: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.txt"
    link.symlink_to(numbers)
    wanted = [
        purpose(numbers, "calibration", num_sequences=100),
        purpose(link, "evaluation", num_sequences=100),
    ]
    drawn = draw(wanted, processors=COUNTING, seed=0)
    assert len(drawn) == 2
    tokens = [set(s.inputs["input_ids"].flatten().tolist()) for s in drawn.values()]
    assert not tokens[0] & tokens[1]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_blocks_are_what_the_checkpoints_own_tokenizer_says(
    name: str, checkpoint: Models, text: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(name))
    drawn = draw(
        [purpose(text, num_sequences=3)], processors=Processors(tokenizer=tokenizer), seed=0
    )
    for row in rows(drawn["calibration"]):
        assert len(row) == 8
        plain = tokenizer.decode(row, skip_special_tokens=True)
        assert plain in text.read_text()
        assert tokenizer(plain)["input_ids"] == row


def test_jsonl_is_read_from_its_text_field(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    lines = [
        json.dumps({"body": " ".join(str(1000 + 10 * i + j) for j in range(10))}) for i in range(3)
    ]
    file.write_text("\n".join([lines[0], "", *lines[1:]]))
    drawn = draw([purpose(file, text_field="body")], processors=COUNTING, seed=0)
    assert {row[0] for row in rows(drawn["calibration"])} == {1000, 1008, 1016}
    with pytest.raises(InputError, match=r"texts.jsonl:1: no text under the key 'text'"):
        draw([purpose(file)], processors=COUNTING, seed=0)
    file.write_text('{"text": "1"}\n{"text": ')
    with pytest.raises(InputError, match=r"texts.jsonl:2: not valid JSON"):
        draw([purpose(file)], processors=COUNTING, seed=0)


def test_a_jsonl_record_ends_at_a_newline_only(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "1000 1001\u20281002 1003"}\r\n{"text": "1004 1005"}\n')
    drawn = draw([purpose(file, sequence_length=6)], processors=COUNTING, seed=0)
    assert rows(drawn["calibration"]) == [[1000, 1001, 1002, 1003, 1004, 1005]]


def test_one_file_is_read_by_one_field(numbers: Path, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"text": numbers.read_text(), "body": numbers.read_text()}))
    wanted = [purpose(file), purpose(file, "evaluation", text_field="body")]
    with pytest.raises(InputError, match=r"evaluation: .*by text_field 'text' already, not 'body'"):
        draw(wanted, processors=COUNTING, seed=0)
    wanted = [
        purpose(numbers, num_sequences=100),
        purpose(numbers, "evaluation", text_field="body", num_sequences=100),
    ]
    drawn = draw(wanted, processors=COUNTING, seed=0)
    assert len(drawn["evaluation"]) == 25, "a .txt has no fields: its tokens were drawn twice"


def test_two_purposes_do_not_share_a_name(numbers: Path) -> None:
    with pytest.raises(InputError, match="are called 'calibration'; rename"):
        draw(
            [purpose(numbers), purpose(numbers)],
            processors=COUNTING,
            seed=0,
        )


def test_a_block_of_a_tensor_file_is_a_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.safetensors"
    x, mask = torch.arange(40.0).reshape(20, 2), torch.arange(20)
    save_file({"x": x, "mask": mask}, file)
    wanted = [
        purpose(file, "calibration", part=(0.0, 0.5), num_sequences=6),
        purpose(file, "evaluation", num_sequences=30),
    ]
    drawn = draw(wanted, processors=Processors(), seed=3)
    fitted, held = drawn["calibration"].inputs, drawn["evaluation"].inputs
    assert fitted["mask"].max() < 10 and len(fitted["x"]) == 6 and len(held["x"]) == 14
    for inputs in (fitted, held):
        assert torch.equal(inputs["x"], x[inputs["mask"]])
    assert sorted([*fitted["mask"].tolist(), *held["mask"].tolist()]) == list(range(20))


def test_batches_keep_the_order_and_lose_nothing(numbers: Path) -> None:
    drawn = draw([purpose(numbers, num_sequences=7)], processors=COUNTING, seed=0)["calibration"]
    batches = list(drawn.batches(3))
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), drawn.inputs["input_ids"])
    assert drawn.num_tokens == 56


def test_fewer_blocks_than_written_is_an_error_with_both_numbers(numbers: Path) -> None:
    with pytest.raises(InputError, match=r"12 free blocks .* 13 were asked for"):
        draw(
            [purpose(numbers, part=(0.0, 0.1), num_sequences=13, required=True)],
            processors=COUNTING,
            seed=0,
        )
    lowered = draw(
        [purpose(numbers, part=(0.0, 0.1), num_sequences=13)],
        processors=COUNTING,
        seed=0,
    )
    assert len(lowered["calibration"]) == 12


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("absent.txt", None, "no such file"),
        ("empty.txt", b"  \n", "the text is empty"),
        ("latin.txt", b"caf\xe9 au lait", "not UTF-8"),
        ("table.xlsx", b"a,b", "not a kind of data"),
        ("broken.safetensors", b"nothing", "cannot be read as safetensors"),
    ],
)
def test_data_that_cannot_be_read(
    name: str, content: bytes | None, cause: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=cause) as caught:
        draw([purpose(file)], processors=COUNTING, seed=0)
    assert str(file) in str(caught.value) and caught.value.remedy


def test_tensors_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for tensors, cause in (
        ({"x": torch.zeros(3, 2), "y": torch.zeros(4)}, "first dimensions differ"),
        ({"x": torch.tensor([[1.0], [float("nan")]])}, "tensor x holds NaN"),
        ({"x": torch.zeros(0, 2)}, "empty"),
    ):
        save_file(tensors, file)
        with pytest.raises(InputError, match=cause):
            draw([purpose(file)], processors=Processors(), seed=0)


def test_text_needs_a_tokenizer_and_room_for_text(numbers: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        draw([purpose(numbers)], processors=Processors(), seed=0)
    with pytest.raises(InputError, match="leaves no room for text"):
        draw(
            [purpose(numbers, sequence_length=3)],
            processors=WRAPPING,
            seed=0,
        )


def test_the_words_of_the_pico_text_are_all_known(checkpoint: Models, text: Path) -> None:
    ids = AutoTokenizer.from_pretrained(checkpoint("llama"))(text.read_text())["input_ids"]
    assert len(ids) == 6000 and pico.SPECIAL.index("[UNK]") not in ids


@pytest.mark.parametrize("count", [1, 7, 64])
def test_few_of_many_millions_of_rows_are_drawn_without_a_permutation(count: int) -> None:
    def drawn(population: int) -> list[int]:
        return draw_module._order(population, count, torch.Generator().manual_seed(3))

    population = 10**12  # a permutation of so many numbers would take 8 TB
    order = drawn(population)
    assert len(order) == len(set(order)) == count
    assert all(0 <= number < population for number in order) and order == drawn(population)
    permuted = torch.randperm(1000, generator=torch.Generator().manual_seed(3))
    assert drawn(1000) == permuted[:count].tolist()


def test_ranges_without_what_is_taken_are_the_free_starts_one_by_one() -> None:
    numbers = random.Random(0)
    for _ in range(300):
        width, begin = numbers.randint(1, 7), numbers.randint(0, 10)
        starts, taken, at = range(begin, 60, width), [], 0
        while at < 60:
            at += numbers.randint(0, 9)
            taken.append((at, at + numbers.randint(1, 9)))
            at = taken[-1][1]
        numbers.shuffle(taken)
        file = draw_module._File(
            data=Rows(tensors={}), text_field="", chat_template=False, taken=taken
        )
        free = [start for part in file.without_taken(starts) for start in part]
        assert free == [
            s for s in starts if all(s + width <= first or last <= s for first, last in taken)
        ]
