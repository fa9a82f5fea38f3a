"""The table of hostile inputs is large, and no case is in it twice."""

from collections import Counter

from hostile import checkpoints, configs, data, networks, outputs, strangers

CASES = [
    *configs.CASES,
    *checkpoints.CASES,
    *data.CASES,
    *networks.CASES,
    *outputs.CASES,
    *outputs.WORK,
    *strangers.CASES,
]


def test_the_table_is_large() -> None:
    """The values of config keys, which are combined from two lists, are not counted."""
    assert len(CASES) >= 700
    assert len(configs.VALUES) >= 600


def test_every_case_is_there_once() -> None:
    names = Counter(case.name for case in [*CASES, *configs.VALUES])
    assert not [name for name, times in names.items() if times > 1]
