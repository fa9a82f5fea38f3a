"""A tokenizer, a chat template and a processor may be a stranger's code: it may raise anything."""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from data_helpers import drawn

from lrc_cli.data.processors import Processors
from lrc_cli.errors import InputError, Interrupted
from lrc_cli.runtime.signals import ending_on_signals

pyo3 = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
"""The class of a panic in Rust, as the package tokenizers raises it."""


def forever() -> Any:
    return forever()


def raising(error: BaseException) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


FAILURES: dict[str, Callable[[], Any]] = {
    "SystemExit(0)": raising(SystemExit(0)),
    "SystemExit": raising(SystemExit()),
    "a panic": raising(pyo3("called `Option::unwrap()` on a `None` value")),
    "KeyboardInterrupt": raising(KeyboardInterrupt()),
    "GeneratorExit": raising(GeneratorExit()),
    "BaseException": raising(BaseException("base")),
    "RecursionError": forever,
    "StopIteration": raising(StopIteration(1)),
    "OSError": raising(OSError(2, "No such file")),
    "UnicodeError": raising(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")),
    "a group": raising(BaseExceptionGroup("two", [SystemExit(0), ValueError(1)])),
    "None": lambda: None,
    "a number": lambda: 7,
    "no ids": lambda: {},
    "ids that are None": lambda: {"input_ids": None},
    "ids of floats": lambda: {"input_ids": [1.5, 2.5]},
    "ids of texts": lambda: {"input_ids": ["a", "b"]},
    "ids in lists": lambda: {"input_ids": [[1, 2], [3]]},
    "ids of 65 bits": lambda: {"input_ids": [2**64]},
    "a result that raises": lambda: Raises(),
}


class Raises:
    def __getitem__(self, key: str) -> Any:
        sys.exit(0)


class Strange:
    """A tokenizer with a token for each character, which fails at one of its calls."""

    is_fast = False
    unk_token_id = None
    chat_template = "{{ messages[0].content }}"

    def __init__(self, fail: Callable[[], Any] | None = None, at: int = 1, way: str = "code"):
        self.calls = itertools.count(1)
        self.fail, self.at, self.way = fail, at, way

    def _failed(self, way: str) -> bool:
        return way == self.way and self.fail is not None and next(self.calls) >= self.at

    def __call__(self, text: str, **_: object) -> Any:
        if self._failed("code"):
            assert self.fail is not None
            return self.fail()
        return {"input_ids": [ord(x) for x in text]}

    def decode(self, ids: list[int]) -> Any:
        if self._failed("decode"):
            assert self.fail is not None
            return self.fail()
        return "".join(map(chr, ids))

    def apply_chat_template(self, messages: Any, **_: object) -> Any:
        if self._failed("template"):
            assert self.fail is not None
            return self.fail()
        return messages[0]["content"]


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Lets signals be handled as a command handles them."""
    with ending_on_signals():
        yield


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "data.txt"
    file.write_text("words of a text " * 100)
    return file


@pytest.mark.parametrize("at", [1, 3, 4])
@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
def test_a_tokenizer_that_fails(fail: Callable[[], Any], at: int, text: Path) -> None:
    with pytest.raises(InputError) as caught:
        drawn(text, Processors(tokenizer=Strange(fail, at)))
    assert str(text) in caught.value.message and "the tokenizer Strange" in caught.value.message
    assert caught.value.remedy and "\n" not in str(caught.value)


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
def test_a_way_back_that_fails_is_not_asked_again(fail: Callable[[], Any], text: Path) -> None:
    found = drawn(text, Processors(tokenizer=Strange(fail, way="decode")))
    assert len(found) == 6


TEMPLATES = {name: FAILURES[name] for name in list(FAILURES)[:11]}


@pytest.mark.parametrize("fail", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_fails(fail: Callable[[], Any], tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    turns = [{"role": "user", "content": "words of a text " * 100}]
    file.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(InputError, match="template fails on the messages: ") as caught:
        drawn(file, Processors(tokenizer=Strange(fail, way="template")), chat_template=True)
    assert str(file) in caught.value.message


def test_a_signal_is_no_failure_of_the_tokenizer(text: Path) -> None:
    with pytest.raises(Interrupted):
        drawn(text, Processors(tokenizer=Strange(raising(Interrupted(15)))))


def test_the_end_of_memory_is_no_failure_of_the_tokenizer(text: Path) -> None:
    with pytest.raises(MemoryError):
        drawn(text, Processors(tokenizer=Strange(raising(MemoryError()))))
