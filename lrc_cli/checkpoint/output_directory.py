"""An output directory is there whole or not at all: it is written elsewhere and renamed at the end.

While an output `OUT` is written, `OUT.partial/` and the lock `OUT.lrc-lock` lie beside it. An
output that is replaced is called `OUT.lrc-old/` for the moment between two renames.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lrc_cli.checkpoint.manifest import MANIFEST_NAME
from lrc_cli.errors import InputError, RunError
from lrc_cli.runtime.files import check_writable, sync_directory
from lrc_cli.runtime.lock import lock_file
from lrc_cli.runtime.processes import ALONE, Processes


@contextmanager
def output_directory(output: Path, *, force: bool, processes: Processes = ALONE) -> Iterator[Path]:
    """A context in which `OUT.partial/` stands for the output, empty at the beginning.

    What a crash left is removed first. When the context ends well, the directory is renamed to the
    output. When an error ends the context, the directory is removed, so a failed run leaves nothing
    that looks like an output. No other run can write the same output meanwhile. All processes of a
    job enter the context; only the first process touches the disk.

    Args:
        output: the directory to write, from `resolve_output`.
        force: replace an output that is there when the context ends.
        processes: the processes of the job.

    Yields:
        The directory to write into.

    Raises:
        RunError: another run is writing the output, or an output appeared and `force` is False.
    """
    partial = _partial(output)
    with ExitStack() as held:
        processes.from_first(lambda: held.enter_context(_locked(output)))
        processes.from_first(lambda: _begin(output))
        try:
            yield partial
            processes.from_first(lambda: _publish(output, force=force))
        except BaseException:
            if processes.is_first and partial.exists():
                shutil.rmtree(partial)
            raise


def tidy(output: Path) -> None:
    """Cleans up after a crash between two renames: one whole output is left, and no old copy.

    Raises:
        RunError: another run is writing the output.
    """
    if _old(output).exists():
        with _locked(output):
            _finish(output)


def resolve_output(path: str) -> Path:
    """Returns the absolute path of the output directory; a link stands for its target.

    Raises:
        InputError: the path has no name, or is a link to nothing.
    """
    if Path(path).is_symlink() and not Path(path).exists():
        raise InputError(f"output.path: {path} is a link to nothing", "remove it")
    output = Path(path).resolve()
    if not output.name:
        raise InputError(f"output.path: {path!r} is not a directory to write", "choose another one")
    return output


def check_output(output: Path, checkpoint: Path, *, force: bool) -> None:
    """Checks before the work begins that the output may be made, or replaced with `force`.

    Args:
        output: the directory to write, from `resolve_output`.
        checkpoint: the path of the checkpoint that is read.
        force: whether an output that lrc wrote may be replaced.

    Raises:
        InputError: nothing can be made there, the output and the checkpoint lie in one another, or
            the output exists and may not be replaced.
        RunError: another run is writing the output.
    """
    check_writable(output.parent, "output.path")
    tidy(output)
    checkpoint = checkpoint.resolve()
    if output == checkpoint:
        raise InputError(
            f"{output}: output.path is the checkpoint itself", "choose another output.path"
        )
    # An output inside the checkpoint would be copied into itself. A checkpoint inside the output
    # would be deleted with the old output.
    if output.is_relative_to(checkpoint) or checkpoint.is_relative_to(output):
        raise InputError(
            f"{output}: output.path and the checkpoint {checkpoint} lie in one another",
            "choose another output.path",
        )
    if not output.exists():
        return
    if not force:
        raise InputError(
            f"{output}: the output exists", "give --force to replace it, or another output.path"
        )
    if not (output / MANIFEST_NAME).exists():
        raise InputError(
            f"{output}: exists and was not written by lrc", "choose another output.path"
        )


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _old(output: Path) -> Path:
    return output.with_name(output.name + ".lrc-old")


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """A context in which no other run can write the output; a killed process frees the lock.

    Raises:
        RunError: another run is writing the output.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_name(output.name + ".lrc-lock")
    handle = lock_file(file)
    if handle is None:
        raise RunError(f"{output}: another lrc run is writing it", "wait for it to end")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        handle.close()


def _begin(output: Path) -> None:
    """Makes an empty partial directory; where a crash left two outputs, one whole output stays."""
    _finish(output)
    partial = _partial(output)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()


def _publish(output: Path, *, force: bool) -> None:
    """Renames the partial directory to the output.

    An old output is renamed first and deleted last, so one whole copy exists at any moment.
    """
    partial, old = _partial(output), _old(output)
    if output.exists():
        if not force:
            raise RunError(
                f"{output}: appeared while the run went on", "give --force to replace it"
            )
        output.rename(old)
    for directory in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync_directory(directory)
    partial.rename(output)
    sync_directory(output.parent)
    if old.exists():
        shutil.rmtree(old)


def _finish(output: Path) -> None:
    """Deletes the old output where a new output is there, and else puts the old output back."""
    old = _old(output)
    if not old.exists():
        return
    if output.exists():
        shutil.rmtree(old)
    else:
        old.rename(output)
