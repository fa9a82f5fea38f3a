"""What the files alone cannot tell of a report, and what tells it: the table in docs/verify.md.

Every leaf of a report that no entry here names is caught by `lrc verify DIR`, which a test holds.
"""

import re

AGAINST, NOTHING = "`--against`", "nothing: the run's own claim"

BEYOND: dict[str, tuple[str, str]] = {
    r"layers\.\[\]\.errors\.(metric|output)\.": (AGAINST, "layers' errors, optima and plain SVD"),
    r"layers\.\[\]\.errors\.held_out\.": (AGAINST, "layers' held-out errors"),
    r"layers\.\[\]\.correction": (AGAINST, "the share of a sequential correction"),
    r"quality\.\[\]\.(kl|top1|num_scored|population|relative|loss|perplexity)": (
        AGAINST,
        "figures of texts that no other figure tells, and their populations",
    ),
    r"provenance\.sequences\.\w+\.(population|num_tokens|sha256)": (
        AGAINST,
        "what was drawn: populations and tokens",
    ),
    r"provenance\.data": (NOTHING, "how much of a text was read, in turns, records and characters"),
    r"provenance\.left_out": (AGAINST, "which files of the original were left out"),
    r"provenance\.checkpoint_sha256": (AGAINST, "hashes of the original's files"),
    r"certificate\.(tolerances|values|clips)": (AGAINST, "a certificate's values and tolerances"),
    r"recovery\.(before|rate|trials|steps)": (
        NOTHING,
        "how training came to its end: the objective before it, the trials of rates, the steps",
    ),
    r"recovery\.": (
        AGAINST,
        "what training gave: the objective after it, its data and length, the norms that moved",
    ),
    r"copies|fused": (AGAINST, "how tensors are tied and taken apart"),
    r"layers: turned round|skipped: turned round": (AGAINST, "the order of layers and tensors"),
    r"layers\.\[\]\.shape|layers\.\[\]\.bytes|layers\.\[\]\.dtype|layers\.\[\]\.block": (
        AGAINST,
        "sizes of layers whose tensors go by other names",
    ),
    r"worst_case": (AGAINST, "the worst-case bound"),
    r"layers\.\[\]\.relu\.\[\]": (NOTHING, "how relu came to its factors: steps, gap, penalty"),
    r"layers\.\[\]\.threshold": (AGAINST, "the threshold of nuclear"),
    r"layers\.\[\]\.max_coefficient": (
        NOTHING,
        "the largest coefficient of layers whose tensors go by other names",
    ),
    r"timing|memory": (NOTHING, "times and memory: numbers of known names"),
    r"provenance\.(code_sha256|python|platform|packages|device|device_name)": (
        NOTHING,
        "versions and hardware: words of a strict form",
    ),
}
"""A pattern of the leaf's name -> what tells of a change, and what the leaf is in words."""


def level_of(name: str) -> str | None:
    """Returns what catches an attack that the files alone do not catch; None: they must."""
    return next((level for pattern, (level, _) in BEYOND.items() if re.match(pattern, name)), None)


def table() -> str:
    """Returns the table for docs/verify.md."""
    rows = [f"| {words} | {level} |" for level, words in BEYOND.values()]
    return "\n".join(
        ["| changed with all that follows from it | caught by |", "| --- | --- |", *rows]
    )
