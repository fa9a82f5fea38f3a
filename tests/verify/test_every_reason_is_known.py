"""`lrc verify` has its own list of reasons, and no reason that the run can give is missing there.

The list is a copy on purpose: a mistake in the run's sentences is not repeated in verify. So this
test reads the source of the run for sentences that stand where a reason is made.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lrc_cli.verify.files import reasons, training

PACKAGE = Path(__file__).resolve().parents[2] / "lrc_cli"
MAKERS = {"SolveError", "left_dense", "_plain"}
"""Functions and classes that take a reason."""
NAMES = {
    "reason", "reasons", "method_reason", "sequential_reason", "why", "few", "numbers", "against",
}  # fmt: skip
"""Names that a reason, or a part of a reason, is bound to."""
HOLE = "{}"
"""What stands in a sentence for a value that is put in."""


def sentences(node: ast.AST) -> Iterator[str]:
    """Yields the texts of several words in an expression."""
    if isinstance(node, ast.JoinedStr):
        pieces = (x.value if isinstance(x, ast.Constant) else HOLE for x in node.values)
        text = "".join(map(str, pieces))
    elif isinstance(node, ast.Constant):
        text = node.value if isinstance(node.value, str) else ""
    else:
        for child in ast.iter_child_nodes(node):
            yield from sentences(child)
        return
    if " " in text.strip():
        yield text


def name_of(node: ast.AST) -> str:
    if isinstance(node, ast.Subscript):
        return name_of(node.value)
    return str(getattr(node, "id", getattr(node, "attr", "")))


def places(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields the expressions in a file that make a reason, and some that make other texts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from node.args if name_of(node.func) in MAKERS else ()
            yield from (x.value for x in node.keywords if x.arg in NAMES)
        elif isinstance(node, ast.Assign):
            names = set(map(name_of, node.targets))
            if names & NAMES or any(name.isupper() for name in names):
                yield node.value
        elif isinstance(node, ast.FunctionDef) and ("why" in node.name or "reason" in node.name):
            yield from (x.value for x in ast.walk(node) if isinstance(x, ast.Return) and x.value)
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            yield node.value


def written() -> dict[str, str]:
    """Returns every sentence that engine/ and job/ may give as a reason, with its file."""
    return {
        sentence: file.relative_to(PACKAGE).as_posix()
        for folder in ("engine", "job")
        for file in sorted((PACKAGE / folder).rglob("*.py"))
        for place in places(ast.parse(file.read_text()))
        for sentence in sentences(place)
    }


Accepts = Callable[[str], bool]


def solves(text: str) -> bool:
    return reasons.SOLVE.fullmatch(text) is not None


def unsolved(text: str) -> bool:
    return solves(f"could not be solved: {text}")


def row(text: str, **facts: Any) -> dict[str, Any]:
    return {
        "name": "a", "shape": (8, 8), "method": "frobenius", "storage": "dense", "reason": text,
        "fallback": False, "tied_to": None, "sequential_failed": False, "sequential_reason": text,
        "method_reason": text, "errors": {"metric": {"stored": 0.5}}, **facts,
    }  # fmt: skip


def dense(text: str) -> bool:
    facts = {"method": "curvature"} if text == reasons.UNGRADED else {}
    return any(
        reasons.layer_problem(row(text, fallback=fallback, **facts), COMPRESSION) is None
        for fallback in (False, True)
    )


def stored(text: str) -> bool:
    rows = (row(text, storage=form) for form in ("factors", "interpolative"))
    return any(reasons.layer_problem(row, COMPRESSION) is None for row in rows)


def asked(text: str) -> bool:
    one = SimpleNamespace(storage="factors", override=lambda _: SimpleNamespace(storage=None))
    return reasons.layer_problem(row(text, storage="factors"), one) is None  # type: ignore[arg-type]


def method(text: str) -> bool:
    return reasons.method_problem(row(text)) is None


def plain(text: str) -> bool:
    facts: tuple[dict[str, Any], ...] = (
        {}, {"storage": "factors", "tied_to": "b", "method": "svd"},
        {"storage": "factors", "trained": True},
    )  # fmt: skip
    return any(reasons.plain_problem(row(text, **x)) is None for x in facts)


def decided(text: str) -> bool:
    return any(
        reasons.decision_problem(
            {"sequential": {"reason": text, "used": used}, "layers": [row("", storage="factors")]},
            SimpleNamespace(sequential=asked, target=("threshold", 1.0)),  # type: ignore[arg-type]
        )
        is None
        for used in (False, True)
        for asked in (False, "auto", True)
    )


def scope(text: str) -> bool:
    sizes = "training all layers together takes about 2 GB, and runtime.memory_limit is 1 GB"
    return training.CHOSEN.fullmatch(sizes + text) is not None


COMPRESSION: Any = SimpleNamespace(
    storage="auto", center=False, override=lambda _: SimpleNamespace(storage=None)
)
NUMBERS = (
    "1 of 1 factorised layers run once, have one of the methods frobenius and curvature and at"
    " least 4 tokens for each input"
)
FEW = "1 have fewer tokens, more than 10% of the weights"
KNOWN: dict[str, tuple[Accepts, str]] = {
    "the eigenvalues are not finite": (unsolved, ""),
    "the {} matrix is not positive definite": (
        unsolved, "the curvature matrix is not positive definite",
    ),
    "the eigenvalues did not converge": (unsolved, ""),
    "the eigenvectors did not converge": (unsolved, ""),
    "its directions cannot be told apart": (unsolved, ""),
    "the sizes of its weights differ by more than float64 resolves": (unsolved, ""),
    "the weight does not fit {}": (unsolved, "the weight does not fit torch.float16"),
    "the factors do not fit {}": (unsolved, "the factors do not fit torch.float16"),
    "could not be solved: {}": (solves, "could not be solved: the eigenvalues are not finite"),
    "no calibration input reached it": (dense, ""),
    "the loss does not depend on it": (dense, ""),
    "dense pays better at this size": (dense, ""),
    "no smaller form meets max_layer_error": (dense, ""),
    "{} as asked for": (asked, "factors as asked for"),
    "interpolative: two factors do not fit these bytes": (stored, ""),
    "{}: {} against {} in the same bytes": (
        stored, "factors: 0.5 against 0.7 for interpolative of rank 3 in the same bytes",
    ),
    "fitted to {} tokens, fewer than its {} inputs": (
        stored, "interpolative: two factors do not fit these bytes; fitted to 3 tokens, fewer than"
        " its 8 inputs",
    ),
    "not followed by {}: fitted with {}": (method, "not followed by ReLU: fitted with frobenius"),
    "its factors are an embedding's too, which comes first": (plain, ""),
    "not with method {}": (plain, "not with method svd"),
    "it runs several times in a pass, on several inputs": (plain, ""),
    "{} tokens to fit to are fewer than {} for each of its {} inputs": (
        plain, "9 tokens to fit to are fewer than 4 for each of its 8 inputs",
    ),
    "the first calibration sequences do not reach it": (plain, ""),
    "it stays dense": (plain, ""),
    "the tokens that reach it depend on the layers before it": (plain, ""),
    "its factors were trained afterwards": (plain, ""),
    "layers before it were trained afterwards": (plain, ""),
    "compression.sequential is false": (decided, ""),
    "auto: {} is about the dense network's inputs": (
        decided, "auto: threshold is about the dense network's inputs",
    ),
    "auto: {} of the bytes are kept, and it is on from {} down": (
        decided, "auto: 70.0% of the bytes are kept, and it is on from 60% down",
    ),
    "asked for": (decided, f"asked for; {NUMBERS}"),
    "auto: {} of the bytes are kept": (decided, f"auto: 50.0% of the bytes are kept; {NUMBERS}"),
    "{}; {}": (decided, f"asked for; {NUMBERS}"),
    "{}; {}; {}": (decided, f"asked for; {NUMBERS}; {FEW}"),
    "{}, and each of them was {} in the end": (
        decided, f"asked for; {NUMBERS}, and each of them was fitted plainly in the end",
    ),
    "{}, but its blocks are no chain": (scope, ", but its blocks are no chain"),
}  # fmt: skip
"""Each reason of the run, what of verify must know it, and how it reads with values in it."""
PIECES = {
    "{} of {} factorised layers run once, have one of the methods {} and at least {} tokens for"
    " each input",
    "{} have fewer tokens, more than {} of the weights",
    "interpolative of rank {}",
}
"""Parts of the reasons above."""
OTHERS = {
    "estimated increase of the loss per token",
    "mean squared output error per token",
    "half the squared output error + l x nuclear norm of the outputs, per token",
    "mean squared output error per token, after the soft threshold",
    "mean squared error behind the ReLU per token",
    "relu fits a bias to its factors in closed form",
    "relu fits a bias of its own",
    "relu is about what follows",
    "squared error of the weights",
    "svd looks at no data",
    "calibration data",
    "lrc version",
    "the training",
    "compression.center fits biases to their factors in closed form",
    "no calibration sequence reaches",
    "{} decides layer by layer",
}
"""Units, names and refusals, which stand in no report as a reason."""


def test_every_sentence_of_the_run_is_in_the_table() -> None:
    """A new reason needs its place in lrc_cli/verify/files/reasons.py, and a line in KNOWN here."""
    found = written()
    new = {s: f for s, f in found.items() if s not in KNOWN and s not in PIECES | OTHERS}
    assert not new
    assert not (KNOWN.keys() | PIECES | OTHERS) - found.keys()


@pytest.mark.parametrize("sentence", KNOWN)
def test_verify_knows_every_reason(sentence: str) -> None:
    accepts, sample = KNOWN[sentence]
    assert accepts(sample or sentence)
    assert not accepts(f"{sample or sentence} and more")
