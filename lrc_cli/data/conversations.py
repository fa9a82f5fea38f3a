"""Conversations become text by the tokenizer's chat template, and the text is checked against them.

A template is a program that prints nothing for keys and roles it does not know. So a conversation
whose turns do not come out is refused. A template may leave out turns on purpose (a system prompt,
earlier reasoning): such turns are counted.
"""

import json
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lrc_cli.data.records import TOOLS, WithTools
from lrc_cli.errors import InputError
from lrc_cli.reading import parse_json
from lrc_cli.runtime.strangers import blaming_input

CONVERSATION = 'give a list of {"role": ..., "content": ...} as the template takes them'
DESCRIBE = 'give a list of {"type": "function", "function": {"name": ..., ...}}'
SECONDS = 20
"""The longest that a template may take for one conversation."""
ROLES = {
    "human": "user",
    "prompter": "user",
    "instruction": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "response": "assistant",
}
"""Names of speakers in common data sets, each with the role that chat templates know."""
KNOWN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})
SPEAKER_KEYS = ("role", "from", "speaker", "author", "sender", "name")
TEXT_KEYS = ("content", "value", "text", "message", "utterance", "parts", "body")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Texts that stand beside a turn's text, which many templates leave out."""
CALL_KEYS = ("tool_calls", "function_call")


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Counts the turns of conversations, and what a chat template left out."""

    total: int = 0
    """The turns that have a text."""
    dropped: int = 0
    """The turns whose text the rendered conversation lacks."""
    shortened: int = 0
    """The turns of whose text the rendered conversation has a part."""

    def __add__(self, other: "Turns") -> "Turns":
        return Turns(
            total=self.total + other.total,
            dropped=self.dropped + other.dropped,
            shortened=self.shortened + other.shortened,
        )


NO_TURNS = Turns()


def render(tokenizer: Any, place: str, messages: Any) -> tuple[str, Turns]:
    """Returns a conversation as text, and what became of its turns.

    A conversation without any text becomes an empty text.

    Args:
        tokenizer: a tokenizer with a chat template.
        place: the record, for messages.
        messages: the conversation, with its tools if it has some.

    Raises:
        InputError: it is no conversation; its keys or roles are not the template's; the template
            fails, takes too long, or prints nothing of the conversation or of its tools.
    """
    tools = _tools(place, messages.tools) if isinstance(messages, WithTools) else None
    messages = messages.messages if isinstance(messages, WithTools) else messages
    # Many templates make an empty text of something that is no conversation.
    if not isinstance(messages, list) or not all(isinstance(x, dict) for x in messages):
        raise InputError(f"{place}: not a conversation", CONVERSATION)
    if not any(_texts(turn) or _calls(turn) for turn in messages):
        return "", Turns()
    template = _template(tokenizer)
    for number, turn in enumerate(messages, start=1):
        _check_speaker(f"{place}: turn {number}", turn, template)
    text = _rendered(tokenizer, place, messages, tools)
    _check_printed(tokenizer, place, messages, text, tools)
    _check_tools(place, tools or [], text)
    folded = _folded(text)
    fates = [_fate(turn, folded) for turn in messages]
    _check_fates(place, messages, fates, template)
    return text, Turns(
        total=sum(fate is not None for fate in fates),
        dropped=fates.count("dropped"),
        shortened=fates.count("shortened"),
    )


def _template(tokenizer: Any) -> str:
    """Returns the source of the chat template, or of all of them where there are several."""
    found = tokenizer.chat_template
    return "\n".join(map(str, found.values())) if isinstance(found, dict) else str(found)


def _tools(place: str, value: Any) -> list[dict[str, Any]]:
    """Returns the tools of a record, which may be written as JSON, as in tables."""
    tools = parse_json(value, f"{place}: {TOOLS}") if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(x, dict) for x in tools):
        raise InputError(f"{place}: {TOOLS} is no list of tools", DESCRIBE)
    return tools


def _check_tools(place: str, tools: Sequence[Mapping[str, Any]], text: str) -> None:
    """Raises InputError if a template prints the name of none of the tools."""
    functions = (tool.get("function", tool) for tool in tools)
    names = [x["name"] for x in functions if isinstance(x, dict) and isinstance(x.get("name"), str)]
    if tools and not any(name and name in text for name in names):
        raise InputError(
            f"{place}: the chat template prints nothing of the record's {TOOLS}",
            f"use a template that takes tools, or leave {TOOLS} out of the records",
        )


def _rendered(
    tokenizer: Any, place: str, messages: Any, tools: list[dict[str, Any]] | None = None
) -> str:
    too_long = InputError(
        f"{place}: the chat template does not end within {SECONDS} seconds",
        "mend the checkpoint's chat_template.jinja, or leave the record out",
    )
    # The template is the checkpoint's code.
    fails = f"{place}: the chat template fails on the messages"
    with blaming_input(fails, CONVERSATION), _within(SECONDS, too_long):
        given = {} if tools is None else {TOOLS: tools}
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **given))


@contextmanager
def _within(seconds: float, too_long: Exception) -> Iterator[None]:
    """A context that raises an error after some time, where the system has such alarms."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: object) -> None:
        raise too_long

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- keys and roles


def _check_speaker(place: str, turn: Mapping[str, Any], template: str) -> None:
    """Raises InputError if the template asks for a role and would not find the turn's."""
    if "role" not in turn:
        others = [key for key in turn if key not in TEXT_KEYS]
        if _reads(template, "role") and not any(_reads(template, key) for key in others):
            raise InputError(
                f"{place} has no 'role', which the chat template asks for, but {_keys(turn)}",
                _renaming(turn),
            )
        return
    role = turn["role"]
    if not isinstance(role, str) or not role.strip():
        raise InputError(f"{place}: its role is {json.dumps(role)}", 'write "user" or "assistant"')
    better = ROLES.get(role.strip().lower(), role.strip().lower())
    if better != role and better in KNOWN_ROLES and not _names(template, role):
        raise InputError(
            f"{place}: the chat template knows no role {role!r}", f'write the role as "{better}"'
        )


def _reads(template: str, key: str) -> bool:
    """Whether a template has the key as an attribute or as a string."""
    return re.search(rf"""(\.\s*|['"]){re.escape(key)}\b""", template) is not None


def _names(template: str, role: str) -> bool:
    return re.search(rf"""['"]{re.escape(role)}['"]""", template) is not None


def _keys(turn: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, turn)) or "none"


def _renaming(turn: Mapping[str, Any]) -> str:
    """Returns the remedy: which keys of a turn should have other names."""
    speaker = next((key for key in SPEAKER_KEYS if key in turn), None)
    text = next((key for key in TEXT_KEYS if key in turn), None)
    renamed = [
        f"{key} to {name}"
        for key, name in ((speaker, "role"), (text, "content"))
        if key is not None and key != name
    ]
    if speaker is None or text is None or not renamed:
        return CONVERSATION
    roles = "" if speaker == "role" else " (with the roles system, user and assistant)"
    return f"rename {' and '.join(renamed)}{roles} in the file"


# ---------------------------------------------------------------- what came out


def _check_printed(
    tokenizer: Any,
    place: str,
    messages: Sequence[Any],
    text: str,
    tools: list[dict[str, Any]] | None = None,
) -> None:
    """Raises InputError if the template prints a value as Python writes it."""
    for number, turn in enumerate(messages, start=1):
        for key in TEXT_KEYS:
            value = turn.get(key)
            if isinstance(value, list | dict) and value and repr(value) in text:
                raise InputError(
                    f"{place}: turn {number}: the chat template takes a text as {key}, not a"
                    f" {type(value).__name__}, and would print Python's notation of it",
                    f"write the text itself under {key}",
                )
    empty = [_without_nulls(turn) for turn in messages]
    if empty != list(messages) and "None" in text:
        other = _rendered(tokenizer, place, empty, tools)
        if other.count("None") < text.count("None"):
            number = next(i for i, pair in enumerate(zip(messages, empty, strict=True), start=1)
                          if pair[0] != pair[1])  # fmt: skip
            raise InputError(
                f'{place}: turn {number}: the chat template prints a null as "None"',
                'write "" in its place, or leave the turn out',
            )


def _without_nulls(turn: Mapping[str, Any]) -> dict[str, Any]:
    return {key: "" if key in TEXT_KEYS and x is None else x for key, x in turn.items()}


def _fate(turn: Mapping[str, Any], rendered: str) -> str | None:
    """Returns "kept", "shortened" or "dropped"; None for a turn without text.

    Args:
        rendered: the rendered conversation, folded.
    """
    texts = _texts(turn)
    if not texts:
        return None
    if all(_is_in(text, rendered) for text in texts):
        return "kept"
    parts = [part for text in texts for part in re.split(r"\n|</?\w+>", text) if part.strip()]
    return "shortened" if any(_is_in(part, rendered) for part in parts) else "dropped"


def _check_fates(
    place: str, messages: Sequence[Any], fates: Sequence[str | None], template: str
) -> None:
    """Raises InputError if all turns were dropped, or one whose role the template does not name."""
    counted = [fate for fate in fates if fate is not None]
    for number, (turn, fate) in enumerate(zip(messages, fates, strict=True), start=1):
        if fate != "dropped":
            continue
        if counted.count("dropped") == len(counted):
            raise InputError(
                f"{place}: the chat template prints no text of the turns, whose keys are"
                f" {_keys(turn)}",
                _renaming(turn),
            )
        role = turn.get("role")
        if role not in KNOWN_ROLES and not _names(template, str(role)):
            raise InputError(
                f"{place}: turn {number}: the chat template prints nothing for the role {role!r},"
                f" with the keys {_keys(turn)}",
                "use roles and keys that the template knows, or leave the turn out",
            )


def _texts(turn: Mapping[str, Any]) -> list[str]:
    """Returns the texts of a turn: under the common keys, or else under all but the speaker's."""
    keys = [key for key in (*TEXT_KEYS, *THOUGHT_KEYS) if key in turn]
    if not keys:
        keys = [key for key in turn if key not in (*SPEAKER_KEYS, *CALL_KEYS)]
    return [text for key in keys for text in _strings(turn[key]) if text.strip()]


def _calls(turn: Mapping[str, Any]) -> bool:
    """Whether a turn calls tools; it needs no text then."""
    return any(turn.get(key) for key in CALL_KEYS)


def _strings(value: Any) -> list[str]:
    """Returns the texts in a value; the words that say which kind a part is are none."""
    if isinstance(value, dict):
        inner = [x for key, x in value.items() if key not in ("type", "id", *SPEAKER_KEYS)]
        return [text for x in inner for text in _strings(x)]
    if isinstance(value, list):
        return [text for x in value for text in _strings(x)]
    return [] if value is None or isinstance(value, bool) else [str(value)]


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _is_in(text: str, folded: str) -> bool:
    """Whether a text is in a folded one as it is, or as JSON writes it."""
    forms = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    return any(_folded(form) in folded for form in forms)
