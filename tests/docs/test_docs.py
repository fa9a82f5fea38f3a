"""The documentation says what the program does."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from lrc_cli.cli import lrc
from lrc_cli.config import load_config

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_reference_is_up_to_date() -> None:
    script = ROOT / "scripts" / "references.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_every_shipped_config_is_valid(file: Path) -> None:
    assert load_config(file).output.path.startswith("out/")


PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = re.compile(r"\b(?:torchrun|srun|SBATCH|pip)\b|rdzv")
"""Other people's commands, and their options."""
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def code(page: Path) -> list[str]:
    """Every line of a page's code blocks, continued lines joined, and every code span."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```.*?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`]+)`", rest)
    return [piece.partition(" #")[0].replace("\n", " ") for piece in (*lines, *spans)]


def options(command: click.Command) -> set[str]:
    own = (option for parameter in command.params for option in parameter.opts)
    return {"--help", *own}


def script_options() -> set[str]:
    scripts = [*ROOT.glob("scripts/*.py"), *ROOT.glob("scripts/*.sh")]
    return {option for file in scripts for option in OPTION.findall(file.read_text("utf-8"))}


def test_the_readme_shows_the_two_commands_that_do_everything() -> None:
    shown = [line.strip() for line in code(ROOT / "README.md")]
    assert {"make demo", "make test"} <= set(shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_target_that_is_shown_is_in_the_makefile(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    shown = {name for piece in code(page) for name in re.findall(r"\bmake ([a-z]+)", piece)}
    assert shown <= targets
    assert page.name != "README.md" or len(shown) > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_that_is_shown_exists(page: Path) -> None:
    known = set.union(*map(options, lrc.commands.values())) | {"--version"} | script_options()
    for piece in code(page):
        _, _, ours = piece.rpartition("torchrun ")
        called = re.search(r"(?:\blrc|-m lrc_cli) ([a-z]+)\b(.*)", ours)
        if called:
            name, rest = called.groups()
            assert name in lrc.commands, piece
            assert set(OPTION.findall(rest)) <= options(lrc.commands[name]), piece
        elif not ELSEWHERE.search(piece):
            assert set(OPTION.findall(piece)) <= known, piece


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_script_that_is_shown_takes_the_options_shown(page: Path) -> None:
    for piece in code(page):
        for name, rest in re.findall(r"(?<!tests/)scripts/(\w+\.\w+)(.*)", piece):
            text = (ROOT / "scripts" / name).read_text(encoding="utf-8")
            missing = [option for option in OPTION.findall(rest) if option not in text]
            assert not missing, piece


def test_every_test_that_a_claim_about_security_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/.]*)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 10
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, missing
