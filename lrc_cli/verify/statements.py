"""Verification makes statements that hold, fail or were not checked, and prints them for people.

No statement is said to hold before it was looked at.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import yaml
from safetensors import SafetensorError

from lrc_cli.errors import LrcError
from lrc_cli.runtime.signals import Interrupted
from lrc_cli.runtime.streams import LONGEST
from lrc_cli.text import cut, named, visible_lines

HOLDS, FAILS, NOT_CHECKED = "holds", "fails", "not checked"

MAX_LINES = 40
"""The number of lines of one status that are printed one by one."""

DAMAGE = (
    LrcError,
    SafetensorError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    yaml.YAMLError,
)
"""The errors that reading a changed file may raise, because its values may be anything."""


class StatementFailed(LrcError):
    """This error says that verification found a statement that does not hold."""

    exit_code = 3


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One sentence about the output, and what became of it."""

    id: str
    """The group of the statement, for instance "tensors.hash"."""
    what: str
    """The sentence that holds or does not."""
    status: str
    """HOLDS, FAILS or NOT_CHECKED."""
    detail: str = ""
    """What was found, or why nothing was looked for."""
    is_open: bool = False
    """Whether the level should have looked at it and could not: `--strict` minds that."""

    def as_dict(self) -> dict[str, str]:
        """Returns the statement for JSON."""
        return {"id": self.id, "what": self.what, "status": self.status, "detail": self.detail}


class Findings:
    """Collects the statements of one verification, in the order in which they are made."""

    def __init__(self) -> None:
        self.statements: list[Statement] = []

    def judge(self, id: str, what: str, problem: str | None, detail: str = "") -> bool:
        """Notes a failed statement if there is a problem, else a true one.

        It returns whether the statement holds.
        """
        status = HOLDS if problem is None else FAILS
        self.statements.append(
            Statement(
                id=id, what=what, status=status, detail=detail if problem is None else problem
            )
        )
        return problem is None

    def equal(self, id: str, what: str, stated: object, found: object) -> bool:
        """Notes that the statement holds if `stated` equals `found`; 1 and True differ."""
        same = stated == found and isinstance(stated, bool) == isinstance(found, bool)
        return self.judge(id, what, None if same else f"stated {stated!r}, found {found!r}")

    def not_checked(self, id: str, what: str, reason: str, *, by_design: bool = False) -> None:
        """Notes that the statement was not looked at.

        Args:
            by_design: whether nobody could have looked at it with the arguments that were given.
        """
        self.statements.append(
            Statement(id=id, what=what, status=NOT_CHECKED, detail=reason, is_open=not by_design)
        )

    @contextmanager
    def guard(
        self, id: str, what: str, passing: tuple[type[Exception], ...] = ()
    ) -> Iterator[None]:
        """Turns any error that damaged files raise within it into a failed statement.

        Args:
            passing: errors that the user made; they are raised as they are.
        """
        try:
            yield
        except Interrupted:
            raise
        except passing:
            raise
        except (MemoryError, torch.OutOfMemoryError) as error:
            self.not_checked(id, what, f"the memory does not suffice: {named(error)}")
        except DAMAGE as error:
            cause = str(error) if isinstance(error, LrcError) else named(error)
            self.judge(id, what, f"cannot be checked against what is there: {cause}")

    def with_status(self, status: str) -> list[Statement]:
        """Returns the statements of one status, in order."""
        return [statement for statement in self.statements if statement.status == status]

    @property
    def failed(self) -> bool:
        """Whether any statement fails."""
        return any(statement.status == FAILS for statement in self.statements)

    @property
    def left_open(self) -> list[Statement]:
        """The statements that should have been looked at and could not be."""
        return [statement for statement in self.statements if statement.is_open]


def render(findings: Findings) -> str:
    """Returns the text for people: failed statements, unchecked ones, then counts of true ones.

    What was left open comes first among the unchecked ones, and has a line with its count.
    """
    unchecked = findings.with_status(NOT_CHECKED)
    lines = [
        *_listed(findings.with_status(FAILS)),
        *_listed(sorted(unchecked, key=lambda statement: not statement.is_open)),
        *(f"{HOLDS}: {id}: {number:,} hold" for id, number in _counts(findings)),
    ]
    totals = [f"{len(findings.with_status(s)):,} {s}" for s in (HOLDS, FAILS, NOT_CHECKED)]
    lines.append(", ".join(totals))
    number = len(findings.left_open)
    if number:
        what = "statements that these arguments ask for"
        lines.append(f"LEFT OPEN: {number:,} of the {what} (exit code 3 with --strict)")
    return visible_lines(lines)


def _listed(statements: list[Statement]) -> list[str]:
    lines = [
        cut(f"{s.status}: {s.id}: {s.what}: {s.detail}", LONGEST) for s in statements[:MAX_LINES]
    ]
    if len(statements) > MAX_LINES:
        left = len(statements) - MAX_LINES
        lines.append(f"{statements[0].status}: and {left:,} more, see --json")
    return lines


def _counts(findings: Findings) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for statement in findings.with_status(HOLDS):
        counts[statement.id] = counts.get(statement.id, 0) + 1
    return list(counts.items())
