"""Conversations under chat templates: each comes out whole, is counted, or is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from data_helpers import drawn
from pico import Models
from transformers import AutoTokenizer

from lrc_cli.data import conversations
from lrc_cli.data.conversations import Turns, render
from lrc_cli.data.processors import Processors
from lrc_cli.data.records import read_records
from lrc_cli.errors import InputError

PLAIN = "{% for m in messages %}<s> {{ m.role }} {{ m['content'] }} </s> {% endfor %}"
BY_NAME = (
    "{% for m in messages %}{% if m['role'] == 'user' %}U {{ m['content'] }} {% elif m['role'] =="
    " 'assistant' %}A {{ m['content'] }} {% endif %}{% endfor %}"
)
SHAREGPT = "{% for m in messages %}{{ m['from'] }}: {{ m['value'] }} {% endfor %}"
EITHER = (
    "{% for m in messages %}{{ m['role'] or m['from'] }}: {{ m['content'] or m['value'] }} "
    "{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{{ m.role }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
)
THINKING = "{% for m in messages %}{{ m.role }} {{ m.content.split('</think>')[-1] }} {% endfor %}"
JSON = "{% for m in messages %}{{ m.role }} {{ m.content | tojson }} {% endfor %}"
UPPER = "{% for m in messages %}{{ m.role }} {{ m.content | upper | trim }} {% endfor %}"
LAST = "{{ messages[-1].role }} {{ messages[-1].content }}"
NULLS = "{% for m in messages %}{{ m.role }} {{ m.get('content', none) }} {% endfor %}"
NOTHING = "w1 w2 w3"
GEMMA = (
    "{% for m in messages %}{{ 'model' if m['role'] in ('assistant', 'model') else m['role'] }}"
    " {{ m['content'] }} {% endfor %}"
)
LOOP = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}{{ role }}"
RAISES = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('a system turn first') }}{% endif %}"
)
HI, YO = "w7 w8 w9", "w11 w12"


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Models) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint("llama"))


def said(tokenizer: Any, template: str, messages: Any) -> tuple[str, Turns]:
    tokenizer.chat_template = template
    return render(tokenizer, "chats.jsonl:3", messages)


def chat(first: Any = HI, second: Any = YO, role: str = "role", text: str = "content") -> list[Any]:
    return [{role: "user", text: first}, {role: "assistant", text: second}]


LONG = f"<think>w1 w2\nw3</think>\n{YO}"
KEPT: dict[str, tuple[str, list[Any], Turns]] = {
    "plain": (PLAIN, chat(), Turns(total=2)),
    "by name": (BY_NAME, chat(), Turns(total=2)),
    "a template of from and value": (SHAREGPT, chat(role="from", text="value"), Turns(total=2)),
    "a template of either, role": (EITHER, chat(), Turns(total=2)),
    "a template of either, from": (EITHER, chat(role="from", text="value"), Turns(total=2)),
    "parts": (PARTS, chat([{"type": "text", "text": HI}]), Turns(total=2)),
    "text under parts": (PARTS, chat(), Turns(total=2)),
    "an image beside a text": (
        PARTS, chat([{"type": "image"}, {"type": "text", "text": HI}]), Turns(total=2),
    ),
    "thinking beside the text is left out": (
        PLAIN, [{**turn, "reasoning_content": "w60 w50 w60"} for turn in chat()],
        Turns(total=2, shortened=2),
    ),
    "thinking is cut": (THINKING, chat(HI, LONG), Turns(total=2, shortened=1)),
    "json": (JSON, chat('w1 "w2"\nw3', "w\u00e9\u00e9"), Turns(total=2)),
    "upper": (UPPER, chat("  w7\n w8 ", YO), Turns(total=2)),
    "only the last turn": (LAST, chat(), Turns(total=2, dropped=1)),
    "a dropped system turn": (
        BY_NAME, [{"role": "system", "content": "w3 w4"}, *chat()], Turns(total=3, dropped=1),
    ),
    "an empty turn": (PLAIN, chat(HI, ""), Turns(total=1)),
    "a blank turn": (PLAIN, chat(HI, " \n"), Turns(total=1)),
    "a null with a call": (
        PLAIN, [*chat(), {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
        Turns(total=2),
    ),
    "a number": (PLAIN, chat(HI, 12.5), Turns(total=2)),
    "Gemma's own role": (
        GEMMA, [chat()[0], {"role": "model", "content": YO}], Turns(total=2),
    ),
    "a role of one's own": (PLAIN, [{"role": "critic", "content": HI}], Turns(total=1)),
    "more keys": (PLAIN, [x | {"weight": 1, "name": "Ann"} for x in chat()], Turns(total=2)),
    "a long text": (PLAIN, chat("w1 " * 5000), Turns(total=2)),
    "a regular expression": (PLAIN, chat(r"w1 \d+ (w2)* [a-z]"), Turns(total=2)),
    "braces": (PLAIN, chat("{{ w1 }} {% w2 %}"), Turns(total=2)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
def test_conversations_come_out_and_what_was_left_out_is_counted(kind: str, tokenizer: Any) -> None:
    template, messages, turns = KEPT[kind]
    text, found = said(tokenizer, template, messages)
    assert found == turns and text.strip()


REFUSED: dict[str, tuple[str, Any, str]] = {
    "from and value": (
        PLAIN, chat(role="from", text="value"),
        "no 'role', .* but 'from', 'value'; rename from to role and value to content",
    ),
    "from and value, by name": (BY_NAME, chat(role="from", text="value"), "no 'role', .*'from'"),
    "from and content": (PLAIN, chat(role="from"), "no 'role', .* but 'from', 'content'; rename"),
    "speaker and text": (PLAIN, chat(role="speaker", text="text"), "rename speaker to role and te"),
    "role and value": (PLAIN, chat(text="value"), "no text of the turns, .*; rename value to cont"),
    "role and text": (BY_NAME, chat(text="text"), "no text of the turns, .*; rename text to conte"),
    "author and message": (PLAIN, chat(role="author", text="message"), "rename author to role"),
    "human and gpt as keys": (PLAIN, [{"human": HI, "gpt": YO}], "no 'role', .* 'human', 'gpt'"),
    "user and assistant as keys": (BY_NAME, [{"user": HI, "assistant": YO}], "'role'|no text"),
    "question and answer": (PLAIN, [{"question": HI, "answer": YO}], "'question', 'answer'; give"),
    "instruction and output": (PLAIN, [{"instruction": HI, "output": YO}], "'instruction', 'outp"),
    "role and content under from and value": (SHAREGPT, chat(), "no text of the turns"),
    "human": (PLAIN, [{"role": "human", "content": HI}], 'no role \'human\'; write .* "user"'),
    "gpt": (PLAIN, [chat()[0], {"role": "gpt", "content": YO}], "turn 2: .*no role 'gpt'"),
    "bot": (BY_NAME, [chat()[0], {"role": "bot", "content": YO}], "turn 2: .*no role 'bot'"),
    "User": (BY_NAME, [{"role": "User", "content": HI}], "no role 'User'; write the role as"),
    "ASSISTANT": (PLAIN, [{"role": "ASSISTANT", "content": HI}], "no role 'ASSISTANT'"),
    "user and a space": (BY_NAME, [{"role": "user ", "content": HI}], "no role 'user '"),
    "a role that is dropped": (
        BY_NAME, [*chat(), {"role": "critic", "content": "w55"}],
        "turn 3: .* nothing for the role 'critic'",
    ),
    "a null role": (PLAIN, [{"role": None, "content": HI}], "turn 1: its role is null"),
    "a role that is a number": (PLAIN, [{"role": 1, "content": HI}], "turn 1: its role is 1"),
    "parts under a template of texts": (
        PLAIN, chat([{"type": "text", "text": HI}]), "turn 1: .* takes a text as content, not a li",
    ),
    "an object under a template of texts": (PLAIN, chat({"text": HI}), "not a dict, and would"),
    "a template that prints nothing": (NOTHING, chat(), "'role', 'content'"),
    "a template that is empty": ("", chat(), "'role', 'content'"),
    "a template that raises": (RAISES, chat(), "fails on the messages: .*a system turn first"),
    "a template that does not compile": ("{% for %}", chat(), "fails on the messages: "),
    "a template that divides": ("{{ 1 / 0 }}", chat(), "fails on the messages: ZeroDivision"),
    "a template that loops": (LOOP, chat(), "does not end within 0.2 seconds"),
    "a template with a huge range": (LOOP.replace("90000", "10**12"), chat(), "fails on the mess"),
    "texts": (PLAIN, [HI, YO], "not a conversation"),
    "a text": (PLAIN, HI, "not a conversation"),
    "an object": (PLAIN, {"role": "user", "content": HI}, "not a conversation"),
    "a list of lists": (PLAIN, [chat()], "not a conversation"),
    "nulls": (PLAIN, [None], "not a conversation"),
    "a number": (PLAIN, 3, "not a conversation"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_conversations_that_would_come_out_wrong_are_refused(
    kind: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, messages, cause = REFUSED[kind]
    if template == LOOP:  # under load, other templates may take as long
        monkeypatch.setattr(conversations, "SECONDS", 0.2)
    with pytest.raises(InputError, match=cause) as caught:
        said(tokenizer, template, messages)
    assert str(caught.value).startswith("chats.jsonl:3") and caught.value.remedy


def test_a_null_that_would_be_printed_is_refused(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Old versions of transformers hand nulls to the template.
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template",
        lambda self, messages, tokenize: " ".join(f"{m['role']} {m['content']}" for m in messages),
    )  # fmt: skip
    with pytest.raises(InputError, match=r'turn 2: the chat template prints a null as "None"'):
        said(tokenizer, PLAIN, chat(HI, None))
    assert said(tokenizer, PLAIN, chat("None", ""))[1] == Turns(total=1)


TOOLED = "{% for t in tools or [] %}{{ t | tojson }} {% endfor %}" + PLAIN
FIND: dict[str, Any] = {"type": "function", "function": {"name": "w60", "parameters": {}}}
TOOLS: dict[str, tuple[Any, str | None]] = {
    "a function": ([FIND], None),
    "the function alone": ([FIND["function"]], None),
    "as JSON": (json.dumps([FIND]), None),
    "an empty list": ([], None),
    "null": (None, None),
    "a template without tools": ([FIND], "prints nothing of the record's tools"),
    "a text": ("w60", "tools is not JSON"),
    "an object": (FIND, "tools is no list of tools"),
    "a list of texts": (["w60"], "tools is no list of tools"),
    "without a name": ([{"type": "function"}], "prints nothing of the record's tools"),
}


@pytest.mark.parametrize("kind", TOOLS)
def test_tools_beside_a_conversation_are_rendered_or_refused(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    tools, cause = TOOLS[kind]
    tokenizer.chat_template = PLAIN if kind == "a template without tools" else TOOLED
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join([json.dumps({"messages": chat(), "tools": tools})] * 3))
    records = list(read_records(file, "messages", with_tools=True))
    if cause is not None:
        with pytest.raises(InputError, match=cause):
            render(tokenizer, *records[0])
        return
    text, turns = render(tokenizer, *records[0])
    assert ("w60" in text) == bool(tools) and turns == Turns(total=2)
    settings = {"chat_template": True, "sequence_length": 4, "num_sequences": 2}
    assert len(drawn(file, Processors(tokenizer=tokenizer), **settings)) == 2


@pytest.mark.parametrize("empty", [[], [{"role": "user", "content": ""}], [{"role": "user"}], [{}]])
def test_conversations_without_text_are_passed_over_and_counted(
    empty: list[Any], tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.chat_template = PLAIN
    own = Processors(tokenizer=tokenizer)
    file = tmp_path / "chats.jsonl"
    rows = [{"messages": messages} for messages in [chat(), empty, chat(YO, HI)]]
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = {"chat_template": True, "sequence_length": 4, "num_sequences": 2}
    found = drawn(file, own, **settings)
    assert found.findings.empty_records == 1 and found.findings.turns == Turns(total=4)
    file.write_text(json.dumps({"messages": empty}))
    with pytest.raises(InputError, match=r"chats.jsonl: there is no conversation in it"):
        drawn(file, own, **settings)
