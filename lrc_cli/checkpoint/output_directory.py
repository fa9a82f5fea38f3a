"""A directory that is there whole or not at all: written beside its place, and renamed at the end.

Beside an output `OUT` lie, while it is written, `OUT.partial/` and the lock `OUT.lrc-lock`; and
`OUT.lrc-old/`, the output that is replaced, for the moment between two renames.
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
    """Within it, an empty `OUT.partial/` stands for the output, in place of what a crash left.

    When the block ends well, the directory is renamed to the output. When it raises, the directory
    is removed, so that a failed run leaves nothing that looks like an output. No other run can
    write the same output meanwhile. Called by all processes; only the first one touches the disk.

    Args:
        output: the directory to write, as `resolve_output` gives it.
        force: replace an output that is there when the block ends.

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
    """Finish what a crash between two renames left: exactly one whole output, and no old copy.

    Raises:
        RunError: another run is writing the output.
    """
    if _old(output).exists():
        with _locked(output):
            _finish(output)


def resolve_output(path: str) -> Path:
    """The absolute path of the output directory; a link stands for the directory it leads to.

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
    """Check that the output may be made, or replaced with `force`, before the work begins.

    Args:
        output: the directory to write, as `resolve_output` gives it.
        checkpoint: the path of the checkpoint that is read.

    Raises:
        InputError: nothing can be made there, it is the checkpoint's place, or it exists and may
            not be replaced.
        RunError: another run is writing the output.
    """
    check_writable(output.parent, "output.path")
    tidy(output)
    checkpoint = checkpoint.resolve()
    if output == checkpoint:
        raise InputError(
            f"{output}: output.path is the checkpoint itself", "choose another output.path"
        )
    # It would be carried over into itself, or the checkpoint be deleted with what it replaces.
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
    """Within it, no other run can write the output; a process that is killed gives the lock back.

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
    """An empty partial directory, and one whole output where a crash left two."""
    _finish(output)
    partial = _partial(output)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()


def _publish(output: Path, *, force: bool) -> None:
    """Rename the partial directory to the output.

    An old output is renamed aside first and deleted last, so one whole copy exists at any moment.
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
    """Keep the new output and delete the old one, or put the old one back where it is alone."""
    old = _old(output)
    if not old.exists():
        return
    if output.exists():
        shutil.rmtree(old)
    else:
        old.rename(output)
