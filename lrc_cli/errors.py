"""Errors that a user can mend have a cause, a remedy and an exit code of `lrc`."""


class LrcError(Exception):
    """A failure with a one-line explanation.

    Args:
        message: the cause, in one sentence without a full stop.
        remedy: the user's next step, or None where there is nothing to add.
    """

    exit_code = 1

    def __init__(self, message: str, remedy: str | None = None) -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(message if remedy is None else f"{message}; {remedy}")


class InputError(LrcError):
    """Bad usage, config or input, found before the first forward pass."""

    exit_code = 2


class RunError(LrcError):
    """The run failed after it had begun."""

    exit_code = 1


class GateMissed(LrcError):
    """The output is written, and misses a gate of the config."""

    exit_code = 3


class StrictFallback(LrcError):
    """`--strict` was given and at least one layer fell back."""

    exit_code = 4


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. torch has a class for this error on a GPU, but not on a CPU."""
    named = type(error).__name__ in ("MemoryError", "OutOfMemoryError")
    return named or "DefaultCPUAllocator" in str(error)


def is_networks(error: Exception) -> bool:
    """Whether a network's own code failed, which may be the user's: not lrc, memory or a disk."""
    return not isinstance(error, LrcError | OSError) and not is_out_of_memory(error)
