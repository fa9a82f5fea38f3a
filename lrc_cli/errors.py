"""Errors that a user can mend have a cause, a remedy and an exit code of `lrc`."""

from collections.abc import Sequence


class LrcError(Exception):
    """A failure with a one-line explanation.

    Args:
        message: the cause, in one sentence without a full stop.
        remedy: the user's next step, or None where there is nothing to add.
    """

    exit_code = 1
    has_trace = False
    """Whether the trace of the cause helps the user, whose own code may be in it."""

    def __init__(self, message: str, remedy: str | None = None) -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(message if remedy is None else f"{message}; {remedy}")


class InputError(LrcError):
    """Bad usage, config or input, found before the first forward pass."""

    exit_code = 2


class Problems(InputError):
    """Several mistakes in one input.

    Args:
        lines: a line for each mistake.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = tuple(lines)
        super().__init__("\n".join(lines))


class RunError(LrcError):
    """The run failed after it had begun."""

    exit_code = 1


class ChangedInput(RunError):
    """An input is not what it was when the run began.

    Args:
        what: the file, and what became of the file.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(
            f"{what} while the run went on, and no output was written",
            "let nothing write to the checkpoint and the data, and run the same command again",
        )


class GateMissed(LrcError):
    """The output is written, and misses a gate of the config."""

    exit_code = 3


class StrictFallback(LrcError):
    """`--strict` was given and at least one layer fell back."""

    exit_code = 4


class Interrupted(KeyboardInterrupt):
    """A signal asks for the end of the run. No code that catches `Exception` swallows this.

    Args:
        number: the number of the signal.
    """

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__("interrupted; the same command goes on where it stopped")


class Stray(Exception):
    """A stranger's code raised what is no `Exception`: it would have ended lrc without a word.

    Args:
        error: such as SystemExit, or KeyboardInterrupt without a signal.
    """

    def __init__(self, error: BaseException) -> None:
        self.error = error
        super().__init__(type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. torch has a class for this error on a GPU, but not on a CPU."""
    if type(error).__name__ in ("MemoryError", "OutOfMemoryError"):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in "".join(
        x for x in error.args if isinstance(x, str)
    )
