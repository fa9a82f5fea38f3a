"""Imports go one way: a folder of the package imports what stands above it in docs/architecture.md.

The list of folders, in that order and with a sentence for each, is the table on that page. Imports
inside functions count as much as the others.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "lrc_cli"
PAGE = ROOT / "docs" / "architecture.md"
ADDRESSES = ("cli.py", "hf.py", "__init__.py", "__main__.py")
"""Files that come last. They hold the addresses that do not move: `lrc`, `lrc_cli.hf`,
`lrc_cli.load`, `lrc_cli.compress` and `python -m lrc_cli`."""
MOST_LEVELS = 13

Edges = Mapping[str, set[str]]


def section(title: str) -> str:
    """The text of the page between a heading and the next one."""
    _, _, rest = PAGE.read_text("utf-8").partition(f"# {title}\n")
    assert rest, title
    return re.split(r"^#+ |^Where to go", rest, maxsplit=1, flags=re.MULTILINE)[0]


@cache
def rooms() -> dict[str, str]:
    """The rows of the page's table: a folder or file of the package, and its sentence."""
    rows = re.findall(r"^\| `([\w./ `]+)` \| (.+) \|$", section("The folders"), re.MULTILINE)
    return {name.rstrip("/"): sentence for names, sentence in rows for name in names.split("` `")}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imported(file: Path) -> Iterator[str]:
    """The package's modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in modules())
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            for name in node.names:
                full = f"{node.module}.{name.name}"
                # The version stands in the package itself, which every import of it begins with.
                if full != "lrc_cli.__version__":
                    yield from {full if full in modules() else node.module} & set(modules())


@cache
def edges() -> Edges:
    return {name: set(imported(file)) for name, file in modules().items()}


def room(module: str) -> str:
    """The row of the table that a module belongs to."""
    return modules()[module].relative_to(PACKAGE).parts[0]


@cache
def arrows() -> Edges:
    """The other rooms that each room imports."""
    found: dict[str, set[str]] = {name: set() for name in rooms()}
    for module, targets in edges().items():
        found[room(module)] |= {room(target) for target in targets} - {room(module)}
    return found


def reached(starts: set[str]) -> set[str]:
    """The modules that an import of these leads to."""
    found, new = set(starts), set(starts)
    while new:
        new = set().union(*(edges()[module] for module in new)) - found
        found |= new
    return found


def test_every_part_of_the_package_is_in_the_list() -> None:
    parts = {file.relative_to(PACKAGE).parts[0] for file in modules().values()}
    assert set(rooms()) == parts
    assert tuple(rooms())[-len(ADDRESSES) :] == ADDRESSES


@pytest.mark.parametrize("name", rooms())
def test_the_list_says_what_the_part_itself_says(name: str) -> None:
    path = PACKAGE / name
    file = path / "__init__.py" if path.is_dir() else path
    docstring = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    assert docstring.partition("\n\n")[0].replace("\n", " ") == rooms()[name]


@pytest.mark.parametrize("name", rooms())
def test_a_room_imports_only_rooms_before_it(name: str) -> None:
    names = list(rooms())
    wrong = [
        f"{module} imports {target}"
        for module, targets in edges().items()
        for target in sorted(targets)
        if room(module) == name and names.index(room(target)) > names.index(name)
    ]
    assert not wrong


def test_there_is_no_circle_of_files() -> None:
    order = list(TopologicalSorter(edges()).static_order())  # raises CycleError, which names it
    assert len(order) == len(modules()) > 100


def test_the_rooms_have_few_levels() -> None:
    levels: dict[str, int] = {}
    for name in TopologicalSorter(arrows()).static_order():
        levels[name] = 1 + max((levels[target] for target in arrows()[name]), default=0)
    number = sum(map(len, arrows().values()))
    print(f"{max(levels.values())} levels, {number} arrows between {len(levels)} rooms")
    assert max(levels.values()) <= MOST_LEVELS


def test_the_numerical_core_imports_nothing_else_of_the_package() -> None:
    assert arrows()["engine"] <= {"errors.py", "text.py", "forms"}


def test_verification_reaches_nothing_that_it_checks() -> None:
    starts = {module for module in modules() if room(module) == "verify"}
    found = {room(module) for module in reached(starts)}
    assert "verify" in found and not found & {"engine", "job", "forecast", "commands"}


def there() -> set[str]:
    """The package's files and folders, and the tests of the documentation, as paths after "/"."""
    files = {"/" + file.relative_to(PACKAGE).as_posix() for file in modules().values()}
    files |= {"/" + file.relative_to(ROOT).as_posix() for file in ROOT.glob("tests/docs/*.py")}
    return files | {f"{file.rpartition('/')[0]}/" for file in files} | {"/lrc_cli/", "/tests/"}


def is_there(name: str) -> bool:
    return any(file.endswith(f"/{name}") for file in there())


def test_every_file_and_folder_that_the_page_names_is_there() -> None:
    """A page that leads a newcomer from file to file must not send anybody to a file that moved."""
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", PAGE.read_text("utf-8")))
    assert len(named) > 15 and sorted(filter(lambda name: not is_there(name), named)) == []


def test_every_object_on_the_way_is_defined_in_a_file_of_its_row() -> None:
    rows = re.findall(
        r"^\| (`.+`.*) \| (.+) \| (.+) \|$", section("Objects on the way"), re.MULTILINE
    )
    assert len(rows) > 25
    for names, _, files in rows:
        named = re.findall(r"`([\w/]+\.py)`", files)
        # A later name without a folder lies beside the first.
        beside = (PACKAGE / named[0]).parent
        paths = [PACKAGE / name if "/" in name else beside / name for name in named]
        text = "\n".join(path.read_text("utf-8") for path in paths)
        for name in re.findall(r"`(\w+)`", names):
            defined = rf"^(?:(?:class|def) {name}\b|{name}(?::.*)? = )"
            assert re.search(defined, text, re.MULTILINE), f"{name} is not in {named}"


def test_every_file_that_the_code_names_is_there() -> None:
    named = {
        (module, name)
        for module, file in modules().items()
        for name in re.findall(r"\b[\w/]+\.py\b", file.read_text("utf-8"))
    }
    assert len(named) > 15 and sorted(x for x in named if not is_there(x[1])) == []


def test_the_way_from_the_command_to_the_file_is_short() -> None:
    """Twelve files and 1,750 lines at most show a newcomer the path in half an hour."""
    steps = re.findall(r"^\d+\. `([\w/]+\.py)`", PAGE.read_text("utf-8"), re.MULTILINE)
    rooms_of_steps = [name.partition("/")[0] for name in steps]
    order = dict.fromkeys(rooms_of_steps)
    assert len(steps) <= 12 and list(order)[:3] == ["cli.py", "commands", "job"]
    assert {"engine", "checkpoint"} <= set(order)
    assert sum(len((PACKAGE / name).read_text("utf-8").splitlines()) for name in steps) < 1750


def test_the_tests_have_the_same_rooms() -> None:
    """Every folder of the package has a folder of tests, and no test lies beside them."""
    tests = ROOT / "tests"
    folders = {file.parent.relative_to(tests).as_posix() for file in tests.rglob("test_*.py")}
    package = {name for name in rooms() if (PACKAGE / name).is_dir()}
    assert folders == package | {"docs", "hostile", "scripts"}
