"""Write docs/cli.md and docs/config.md, the references, from the program itself.

.venv/bin/python scripts/references.py          writes them
.venv/bin/python scripts/references.py --check  exits with 1 if one is out of date
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from lrc_cli.cli import lrc
from lrc_cli.config import CertifyConfig, json_schema

DOCS = Path(__file__).resolve().parent.parent / "docs"
MADE = "Made from the program by `make docs`; do not edit."
EXIT_CODES = """## Exit codes

| code | meaning |
| --- | --- |
| 0 | done, or the output already is what the config asks for |
| 1 | failed while running; finished units stay in the work directory |
| 2 | bad usage, config or input, found before the first forward pass |
| 3 | a gate is missed: the output is there, marked as failed; `verify`: a statement fails |
| 4 | `--strict` was given and a layer fell back to dense |
| 130 | interrupted (Ctrl-C); the same command goes on where it stopped |
| 129, 143 | hung up (SIGHUP, unless `nohup` ignores it), terminated (SIGTERM), the same |

Exit code 0 of `lrc compress` means that the output is there. A first signal waits for the step in
hand, a second one does not.

## Messages

Every command that fails ends with one sentence on standard error. A job may run code that is not
lrc's: a factory, a network, code of the checkpoint. Whatever this code raises, also `SystemExit`
and `KeyboardInterrupt`, is a failure of the job, and the sentence names the factory or the module.
`run.log` in the work directory has the whole text and the trace. Of several processes, the failure
of process N is in `run.N.log`. With the environment variable
`LRC_TRACE=1` every command also shows the trace on standard error.

A line is cut in the middle if it has more than 2,000 characters. Control characters of names and
messages are shown escaped (ESC as `\\x1b`), on the terminal, in `run.log` and in all pages. JSON
has them as JSON escapes them.

Results go to standard output, everything else to standard error:

- A standard error that is closed or full loses messages, and nothing else.
- A standard output that is closed or full is exit code 1 for `plan`, `inspect`, `eval`, `verify`,
  `schema` and every `--json`. `lrc compress` says where its output is and ends as the job does. If
  a reader goes away (`| head`), nothing is said.
- If `run.log` cannot be written or goes away, the run goes on and says so.
"""


def command_reference() -> str:
    """Every command with its options."""
    parts = ["# Command reference", MADE, _help(lrc, "lrc")]
    for name, command in sorted(lrc.commands.items()):
        parts += [f"## `lrc {name}`", _help(command, f"lrc {name}")]
    return "\n\n".join([*parts, EXIT_CODES])


def _help(command: click.Command, name: str) -> str:
    context = click.Context(command, info_name=name, terminal_width=88, max_content_width=88)
    return f"```text\n{command.get_help(context)}\n```"


def config_reference() -> str:
    """Every key of both configs, with its default."""
    lines = [
        "# Config reference",
        "",
        f"{MADE} `lrc schema` prints the same, with the values that a key takes, as JSON Schema.",
    ]
    for section, facts in json_schema()["properties"].items():
        lines += ["", f"## `{section}`", "", _sentence(facts), "", *_table(facts, section)]
    whole = json_schema(CertifyConfig)
    lines += ["", "# Config of `lrc certify`", "", _sentence(whole)]
    lines += ["`lrc schema --certify` prints the same as JSON Schema.", "", *_table(whole, "")]
    return "\n".join(lines) + "\n"


def _table(facts: dict[str, Any], section: str) -> list[str]:
    rows = [f"| {' | '.join(row)} |" for row in _rows(facts, section)]
    return ["| key | default | meaning |", "| --- | --- | --- |", *rows]


def _rows(facts: dict[str, Any], key: str) -> Iterator[tuple[str, str, str]]:
    """Key, default and meaning of everything below a section."""
    for suffix, inner in _forms(facts):
        if "properties" in inner:
            if suffix:
                yield f"`{key}`", _default(facts), _sentence(facts)
            for name, below in inner["properties"].items():
                required = {"default": "required"} if name in inner.get("required", ()) else {}
                yield from _rows(required | below, f"{key}{suffix}.{name}".removeprefix("."))
            return
    yield f"`{key}`", _default(facts), _sentence(facts)


def _forms(facts: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The forms that a value may have, with the suffix that addresses its parts."""
    for form in (facts, *facts.get("anyOf", ())):
        yield "", form
        for suffix, parts in (("[]", "items"), (".PATTERN", "additionalProperties")):
            if isinstance(form.get(parts), dict):
                yield suffix, form[parts]


def _default(facts: dict[str, Any]) -> str:
    if "default" not in facts:
        return ""
    if facts["default"] == "required":
        return "required"
    return f"`{json.dumps(facts['default'])}`"


def _sentence(facts: dict[str, Any]) -> str:
    return str(facts.get("description", "")).replace("|", "\\|")


def main() -> None:
    """Write the pages, or compare them."""
    pages = {"cli.md": command_reference(), "config.md": config_reference()}
    for name, text in pages.items():
        target = DOCS / name
        if "--check" not in sys.argv[1:]:
            target.write_text(text, encoding="utf-8")
        elif not target.exists() or target.read_text(encoding="utf-8") != text:
            sys.exit(f"{name} is out of date: run `make docs`")


if __name__ == "__main__":
    main()
