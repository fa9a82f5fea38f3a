"""Say what of lrc's requirements this interpreter lacks, by pyproject.toml; exits with 1 if any.

    python3 scripts/installed.py

For machines without a network, where `make setup` cannot run: what is missing has to be brought
as wheels. Standard library only. An older torch is named and let pass, because the code uses
nothing newer than 2.11; any other package must be as new as pyproject.toml says.
"""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
FOR_TESTS = ("hypothesis", "jsonschema", "pytest", "pytest-timeout")
OLDEST_TORCH = (2, 11)


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.11.0+cu130 is (2, 11, 0)."""
    return tuple(map(int, re.findall(r"\d+", re.split(r"[+a-z]", text)[0])))


def problem(name: str, lowest: str) -> str | None:
    """The problem with an installed package, in a few words."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return f"{name}: missing{f', {lowest} or newer is needed' if lowest else ''}"
    if name == "torch" and OLDEST_TORCH <= numbers(found) < numbers(lowest):
        print(f"torch {found} is older than {lowest}, which pip would ask for; trying all the same")
        return None
    if lowest and numbers(found) < numbers(lowest):
        return f"{name}: {found} is too old, {lowest} or newer is needed"
    return None


def main() -> None:
    """Check every requirement."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    wanted = {name: "" for name in FOR_TESTS}
    for requirement in project["dependencies"]:
        name, _, rest = requirement.partition(">=")
        wanted[name] = rest.partition(",")[0]
    problems = [text for name, lowest in wanted.items() if (text := problem(name, lowest))]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        sys.exit("bring these as wheels: pip download here, pip install --no-index --target there")
    print("everything is installed")


if __name__ == "__main__":
    main()
