"""Write docs/cli.md, the command reference, from the commands themselves.

.venv/bin/python scripts/command_reference.py          writes it
.venv/bin/python scripts/command_reference.py --check  exits with 1 if it is out of date
"""

import sys
from pathlib import Path

import click

from lrc_cli.cli import lrc

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
EXIT_CODES = """## Exit codes

| code | meaning |
| --- | --- |
| 0 | done, or the output already is what the config asks for |
| 1 | failed while running; finished units stay in the work directory |
| 2 | bad usage, config or input, found before the first forward pass |
| 3 | a gate is missed: the output is there, marked as failed; `verify`: a statement fails |
| 4 | `--strict` was given and a layer fell back to dense |
| 130 | interrupted (Ctrl-C); the same command goes on where it stopped |
| 143 | terminated (SIGTERM), the same |

Results go to standard output, everything else to standard error.
"""


def reference() -> str:
    """The whole page."""
    parts = [
        "# Command reference",
        "Made from the program by `make docs`; do not edit.",
        _help(lrc, "lrc"),
    ]
    for name, command in sorted(lrc.commands.items()):
        parts += [f"## `lrc {name}`", _help(command, f"lrc {name}")]
    return "\n\n".join([*parts, EXIT_CODES])


def _help(command: click.Command, name: str) -> str:
    context = click.Context(command, info_name=name, terminal_width=88, max_content_width=88)
    return f"```text\n{command.get_help(context)}\n```"


def main() -> None:
    """Write the page, or compare it."""
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(reference(), encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != reference():
        sys.exit(f"{TARGET.name} is out of date: run `make docs`")


if __name__ == "__main__":
    main()
