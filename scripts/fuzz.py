"""Try the properties of the readers for some time, each with its share: FUZZ_SECONDS, or 600.

Every round has a seed of its own, which is printed where an example fails. Nothing is stored.
"""

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

from hostile.harness import Pristine
from hostile.properties import properties
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

EXAMPLES = 200
"""The examples of a round, after which the time is looked at."""


def tried(inputs: SearchStrategy[Any], holds: Callable[[Any], None], number: int) -> int:
    """Tries one round; returns the number of examples.

    Raises:
        Exception: an example fails; hypothesis has printed the smallest.
    """
    count = 0

    @seed(number)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def one(value: Any) -> None:
        nonlocal count
        count += 1
        holds(value)

    one()
    return count


def main() -> int:
    """Returns 1 if an example failed."""
    seconds = float(os.environ.get("FUZZ_SECONDS", "600"))
    with tempfile.TemporaryDirectory() as folder:
        report = json.loads((Pristine(Path(folder)).done / "out/report.json").read_text())
    table = properties(report)
    failures = 0
    for name, (inputs, holds) in table.items():
        end, count, rounds = time.monotonic() + seconds / len(table), 0, 0
        while time.monotonic() < end:
            number = random.SystemRandom().randrange(2**32)
            try:
                count += tried(inputs, holds, number)
            except Exception as error:
                failures += 1
                print(f"{name}: seed {number}: {type(error).__name__}: {error}"[:2000])
                print("\n".join(getattr(error, "__notes__", []))[:4000])
                break
            rounds += 1
        print(f"{name}: {count} examples in {rounds} rounds", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
