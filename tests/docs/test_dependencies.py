"""Every lower end that pyproject.toml claims is one that `make floor` runs the tests on."""

import re
import tomllib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements() -> list[Requirement]:
    """The requirements of the project and of all its extras, without the extras themselves."""
    lines = chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    return [r for r in map(Requirement, lines) if r.name != PROJECT["name"]]


def pinned(lines: Iterable[str]) -> dict[str, Version]:
    """The versions that a constraints file pins, by name."""
    pins = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pins}


FLOOR, OURS = (
    pinned((ROOT / name).read_text(encoding="utf-8").splitlines())
    for name in ("constraints-floor.txt", "constraints.txt")
)


def test_every_dependency_has_a_lower_end_and_every_lower_end_is_tested() -> None:
    claimed: dict[str, Version] = {}
    for requirement in requirements():
        (lowest,) = (s.version for s in requirement.specifier if s.operator == ">=")
        claimed[canonicalize_name(requirement.name)] = Version(lowest)
    assert claimed == FLOOR


def test_our_own_versions_are_allowed() -> None:
    for requirement in requirements():
        assert requirement.specifier.contains(OURS[canonicalize_name(requirement.name)])


def test_make_floor_installs_the_lower_ends_of_every_extra() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (extras,) = re.findall(r"\$\(FLOOR\).*-c constraints-floor\.txt -e '\.\[(.*)\]'", makefile)
    named = {*extras.split(",")}
    for line in PROJECT["optional-dependencies"]["dev"]:
        requirement = Requirement(line)
        named |= requirement.extras if requirement.name == PROJECT["name"] else set()
    assert named == set(PROJECT["optional-dependencies"])
