"""Special tokens are found by asking the tokenizer, and what it loses of a text is counted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import drawn
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

from lrc_cli.data.processors import Processors
from lrc_cli.data.special_tokens import (
    Reading,
    check_reading,
    read_reading,
    special_tokens,
    token_ids,
)
from lrc_cli.errors import InputError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CLS, SEP, UNKNOWN = 2, 3, 1
DNA = "ACGGT" * 90
ENGLISH = "one two three two one three " * 20


def fast(
    model: Any,
    *,
    around: str = "[CLS] $A [SEP]",
    unknown: str | None = None,
    normalizer: Any = None,
    pre: Any = None,
) -> Any:
    """Returns a tokenizer of transformers around one of the package tokenizers."""
    core = Tokenizer(model)
    core.add_special_tokens(SPECIAL)
    ids = [(word, core.token_to_id(word)) for word in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    if normalizer is not None:
        core.normalizer = normalizer
    if pre is not None:
        core.pre_tokenizer = pre
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unknown, pad_token="[PAD]")


def vocabulary(words: Any) -> dict[str, int]:
    return {word: i for i, word in enumerate([*SPECIAL, *words])}


def letters(words: str = "ACGT", unknown: str | None = None, **more: Any) -> Any:
    return fast(models.BPE(vocabulary(words), [], unk_token=unknown), unknown=unknown, **more)


def words(*known: str, unknown: str | None = "[UNK]", **more: Any) -> Any:
    model = models.WordLevel(vocabulary(known), unk_token=unknown) if unknown else None
    model = model or models.WordLevel(vocabulary(known))
    return fast(model, unknown=unknown, pre=pre_tokenizers.WhitespaceSplit(), **more)


def bytes_(**more: Any) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pre = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return fast(models.BPE(vocabulary(alphabet), []), pre=pre, **more)


def pieces(**more: Any) -> Any:
    known = [*SPECIAL, "\u2581", "\u2581one", "t", "w", "o", "h", "r", "e", "n"]
    model = models.Unigram([(word, -1.0) for word in known], unk_id=UNKNOWN)
    return fast(model, unknown="[UNK]", pre=pre_tokenizers.Metaspace(), **more)


class Own:
    """A tokenizer of somebody's own code: a letter is a token, and 7 and 8 go around a text."""

    unk_token_id = None

    def __init__(self, around: str = "both", loses: str = "") -> None:
        self.around, self.loses = around, loses

    def __call__(self, text: str, *, add_special_tokens: bool, **_: Any) -> dict[str, list[int]]:
        ids = [ord(x) for x in text if x not in self.loses]
        if not add_special_tokens:
            return {"input_ids": ids}
        wrapped = {"both": [7, *ids, 8], "reversed": [7, *reversed(ids), 8], "none": ids}
        wrapped["by start"] = [7, *ids] if text.startswith("o") else [*ids, 8]
        return {"input_ids": wrapped[self.around]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


Around = tuple[list[int], list[int]]
BOTH: Around = ([CLS], [SEP])
FOUND: dict[str, tuple[Callable[[], Any], str, Around]] = {
    "letters of DNA": (letters, DNA, BOTH),
    "one letter again and again": (letters, "A" * 300, BOTH),
    "letters, begin only": (lambda: letters(around="[CLS] $A"), DNA, ([CLS], [])),
    "letters, end only": (lambda: letters(around="$A [SEP]"), DNA, ([], [SEP])),
    "letters, nothing": (lambda: letters(around="$A"), DNA, ([], [])),
    "letters, two and two": (
        lambda: letters(around="[CLS] [CLS] $A [SEP] [SEP]"), DNA, ([CLS, CLS], [SEP, SEP]),
    ),
    "letters that lowercase": (
        lambda: letters("acgt", normalizer=normalizers.Lowercase()), DNA, BOTH,
    ),
    "words": (lambda: words("one", "two", "three"), ENGLISH, BOTH),
    "words, a long text": (lambda: words("one", "two", "three"), ENGLISH * 60, BOTH),
    "words without unknown": (lambda: words("one", "two", "three", unknown=None), ENGLISH, BOTH),
    "words without unknown, a long text": (
        lambda: words("one", "two", "three", unknown=None), ENGLISH * 60, BOTH,
    ),
    "words, special ones in the text": (
        lambda: words("one", "two", "three"), f"[CLS] {ENGLISH} [SEP]", BOTH,
    ),
    "bytes": (bytes_, ENGLISH, BOTH),
    "bytes of Chinese": (bytes_, "\u4f60\u597d\u4e16\u754c " * 50, BOTH),
    "bytes, nothing": (lambda: bytes_(around="$A"), ENGLISH, ([], [])),
    "pieces": (pieces, ENGLISH, BOTH),
    "pieces, end only": (lambda: pieces(around="$A [SEP]"), ENGLISH, ([], [SEP])),
    "ByT5": (ByT5Tokenizer, ENGLISH, ([], [1])),
    "Canine": (CanineTokenizer, ENGLISH, ([0xE000], [0xE001])),
    "code of its own": (Own, ENGLISH, ([7], [8])),
    "code of its own, nothing": (lambda: Own("none"), ENGLISH, ([], [])),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOUND)
def test_special_tokens_are_what_the_tokenizer_adds(kind: str) -> None:
    make, text, around = FOUND[kind]
    tokenizer = make()
    assert special_tokens(tokenizer, text, "a.txt") == around
    reading = read_reading(tokenizer, text, "a.txt")
    assert reading is not None and reading.characters and reading.unread == 0.0


@pytest.mark.parametrize("kind", FOUND)
def test_every_block_is_wrapped_as_a_text_is(kind: str, tmp_path: Path) -> None:
    make, text, (before, behind) = FOUND[kind]
    (tmp_path / "a.txt").write_text(text)
    tokenizer = make()
    found = drawn(tmp_path / "a.txt", Processors(tokenizer=tokenizer), num_sequences=3)
    plain = token_ids(tokenizer, text, "a.txt")
    for row in found.inputs["input_ids"].tolist():
        assert row[: len(before)] == before and row[len(row) - len(behind) :] == behind
        inner = row[len(before) : len(row) - len(behind)]
        assert any(plain[i : i + len(inner)] == inner for i in range(len(plain)))


REFUSED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "no letter is known": (letters, "acgt" * 90, r"tokenizer \w+ knows 0.0% of the text"),
    "all is unknown": (lambda: letters(unknown="[UNK]"), "acgt" * 90, "knows 0.0% of the text"),
    "nearly all is lost": (letters, "xyzxyzxyzxyzA" * 40, "knows 7.7% of the text"),
    "words of another language": (lambda: words("uno"), ENGLISH, "knows 0.0% of the text"),
    "a word that is not known": (
        lambda: words("one", "two", unknown=None), ENGLISH, r"tokenizer \w+ fails on the text: ",
    ),
    "a normaliser that drops": (
        lambda: letters(normalizer=normalizers.Replace("A", "")), "A" * 300, "knows 0.0%",
    ),
    "own code that drops": (lambda: Own(loses="onethrw"), ENGLISH, "Own knows 0.0% of the text"),
    "own code that reverses": (lambda: Own("reversed"), ENGLISH, "changes the tokens of a text"),
    "own code that wavers": (
        lambda: Own("by start"), "one " * 2000 + "two " * 2000, "changes the tokens of a text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_text_that_the_tokenizer_does_not_know_is_refused(kind: str, tmp_path: Path) -> None:
    make, text, cause = REFUSED[kind]
    file = tmp_path / "a.txt"
    file.write_text(text)
    with pytest.raises(InputError, match=cause) as caught:
        drawn(file, Processors(tokenizer=make()))
    assert str(file) in str(caught.value) and caught.value.remedy


LOST: dict[str, tuple[Callable[[], Any], str, Reading]] = {
    "letters that are dropped": (letters, "ACGTN" * 10, Reading(characters=50, lost=10)),
    "letters that are unknown": (
        lambda: letters(unknown="[UNK]"), "ACGTNN" * 10, Reading(characters=60, unknown=20),
    ),
    "spaces do not count": (letters, "AC GT\n" * 10, Reading(characters=40)),
    "a word": (lambda: words("one"), "one three " * 10, Reading(characters=80, unknown=50)),
    "own code": (lambda: Own(loses="e"), "one two " * 10, Reading(characters=60, lost=10)),
    "nothing of an empty text": (letters, "", Reading()),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOST)
def test_characters_that_no_token_stands_for_are_counted(kind: str) -> None:
    make, text, reading = LOST[kind]
    tokenizer = make()
    assert read_reading(tokenizer, text, "a.txt") == reading
    check_reading(reading, tokenizer, "a.txt")


def test_a_tokenizer_without_a_way_back_tells_nothing() -> None:
    class Silent(Own):
        def decode(self, ids: list[int]) -> str:
            raise NotImplementedError

    assert read_reading(Silent(), ENGLISH, "a.txt") is None
    check_reading(None, Silent(), "a.txt")


def test_of_a_long_text_pieces_are_asked_about() -> None:
    tokenizer = letters()
    reading = read_reading(tokenizer, "ACGTN" * 100_000, "a.txt")
    assert reading is not None and reading.characters < 150_000
    assert reading.unread == pytest.approx(0.2, abs=0.01)
    assert isinstance(tokenizer.backend_tokenizer.decoder, decoders.Decoder | None)
