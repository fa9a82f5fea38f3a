"""No sequence is trained on that is certified, evaluated on or held out; what else is drawn again.

A counting tokenizer makes every token of a file another number, so any shared token shows.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pico
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pico import Models

from lrc_cli.config import load_config
from lrc_cli.config.sections import Recover
from lrc_cli.data.draw import Purpose, Sequences, draw
from lrc_cli.data.processors import Processors
from lrc_cli.data.purposes import CALIBRATION, CERTIFICATION, RECOVER
from lrc_cli.job.fingerprints import factors_fingerprint
from lrc_cli.job.plan import Plan, make_plan
from lrc_cli.job.recover.model import split
from lrc_cli.job.recover.scope import drawn_for, training_data
from lrc_cli.job.recover.stage import own_stages
from lrc_cli.verify.again import recovery


def counted(text: str, **_: Any) -> dict[str, list[int]]:
    """Tokenizes numbers: each is its own token."""
    return {"input_ids": [int(word) for word in text.split()]}


COUNTING = Processors(tokenizer=counted)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files by kind: all tokens differ, every passage comes twice, one passage again and again."""
    folder = tmp_path_factory.mktemp("numbers")
    passages = [range(8 * i, 8 * i + 8) for i in range(60)]
    twice = [*passages, *random.Random(0).sample(passages, len(passages))]
    kinds = {"different": passages, "twice": twice, "copy": passages, "same": passages[:3] * 40}
    for kind, parts in kinds.items():
        (folder / f"{kind}.txt").write_text(" ".join(str(i) for part in parts for i in part))
    return {kind: folder / f"{kind}.txt" for kind in kinds}


shares = st.tuples(st.integers(0, 10), st.integers(0, 10)).filter(lambda ab: ab[0] != ab[1])
wishes = st.tuples(shares, st.sampled_from([4, 8, 16]), st.integers(1, 24))
names = (CALIBRATION, CERTIFICATION, "near", "far", RECOVER)


@settings(max_examples=150, deadline=None)
@given(
    wanted=st.tuples(wishes, wishes, wishes, wishes, wishes),
    kinds=st.tuples(*(st.sampled_from(["different", "twice", "copy", "same"]) for _ in names)),
    used=st.sets(st.sampled_from(names[1:])),
    seed=st.integers(0, 3),
)
def test_what_is_trained_on_is_nowhere_else(
    files: dict[str, Path],
    wanted: tuple[tuple[tuple[int, int], int, int], ...],
    kinds: tuple[str, ...],
    used: set[str],
    seed: int,
) -> None:
    purposes = [
        Purpose(
            name=name,
            path=files[kind],
            part=(min(part) / 10, max(part) / 10),
            sequence_length=length,
            num_sequences=number,
            required=False,
        )
        for name, kind, (part, length, number) in zip(names, kinds, wanted, strict=True)
        if name == CALIBRATION or name in used
    ]
    drawn = draw(purposes, processors=COUNTING, seed=seed)
    if CALIBRATION not in drawn:
        return
    plan: Any = SimpleNamespace(sequences=drawn)
    data = training_data(plan)
    others = [x for name, x in drawn.items() if name not in (CALIBRATION, RECOVER)]
    forbidden = {row for other in others for row in rows(other)}
    assert not forbidden & set(rows(data))
    kept = [row for row in rows(drawn_for(plan)) if row not in forbidden]
    assert list(rows(data)) == kept, "a sequence was left out without cause, or moved"
    if not data:
        return
    trained, kept_out = split(data)
    assert kept_out and not set(rows(trained)) & set(rows(kept_out))
    assert set(rows(data)) == set(rows(trained)) | set(rows(kept_out))
    # Where no passage comes twice, not even a token is shared.
    if set(kinds) == {"different"}:
        assert not tokens(data) & {token for other in others for token in tokens(other)}
    # `lrc verify` comes to the same sequences in its own way.
    for found, mine in zip(
        recovery.split(recovery._without(drawn_for(plan), *others)),
        (trained, kept_out),
        strict=True,
    ):
        assert list(rows(found)) == list(rows(mine))


def rows(sequences: Sequences) -> Iterator[tuple[int, ...]]:
    return map(tuple, sequences.inputs["input_ids"].tolist())


def tokens(sequences: Sequences) -> set[int]:
    return {token for row in rows(sequences) for token in row}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory, checkpoint: Models, text: Path) -> Plan:
    changes = {
        "model.path": str(checkpoint("llama")),
        "calibration.path": str(text),
        "recover.scope": "model",
    }
    return make_plan(load_config(pico.job(tmp_path_factory.mktemp("plan"), changes)))


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, False),
        ({"tokens": 5000}, True),
        ({"minutes": 2.0}, True),
        ({"norms": True}, True),
        ({"path": "elsewhere.txt"}, False),
        ({"path": "elsewhere.txt", "part": (0.0, 0.5)}, False),
        ({"num_sequences": 7}, False),
    ],
    ids=str,
)
def test_the_keys_that_say_how_to_train_and_the_data_count_and_nothing_before_them_does(
    changes: dict[str, Any], counts: bool, plan: Plan
) -> None:
    """Keys that say where data lies count by the data, which is the same here."""
    changed = replace(plan, config=replace(plan.config, recover=Recover(scope="model", **changes)))
    (factors, before, _), (same, after, _) = own_stages(plan), own_stages(changed)
    assert factors == same and (before != after) is counts
    identity = plan.statistics_fingerprint
    own = factors_fingerprint(changed.config, str(identity))
    assert own == factors_fingerprint(plan.config, str(identity))


@pytest.mark.parametrize("what", ["other sequences", "fewer", "an evaluated one"])
def test_other_data_counts(what: str, plan: Plan) -> None:
    whole = plan.sequences[CALIBRATION]
    first, rest = whole.split(1)
    ids = whole.inputs["input_ids"]
    changed = {
        "other sequences": {RECOVER: replace(whole, inputs={"input_ids": ids + 1}, sha256="other")},
        "fewer": {RECOVER: whole.apart_from([rest])},
        "an evaluated one": {"near": first},
    }[what]
    other = replace(plan, sequences={**plan.sequences, **changed})
    assert own_stages(plan)[0] == own_stages(other)[0]
    assert own_stages(plan)[1] != own_stages(other)[1]
