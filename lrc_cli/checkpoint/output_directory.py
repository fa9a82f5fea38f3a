"""An output directory is there whole or not at all: it is written elsewhere and renamed at the end.

While an output `OUT` is written, `OUT.partial/` and the lock `OUT.lrc-lock` lie beside it. An
output that is replaced is called `OUT.lrc-old/` for the moment between two renames.

A name does not make a directory lrc's. A directory is deleted only if its content shows who made
it: a finished output has lrc's manifest, and a partial one has a file that marks it. Both files are
deleted last.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lrc_cli.checkpoint.manifest import (
    MANIFEST_NAME,
    PARTIAL_MARK,
    find_added,
    find_changed,
    is_own_output,
)
from lrc_cli.errors import InputError, RunError
from lrc_cli.runtime.files import check_writable, sync_directory
from lrc_cli.runtime.lock import lock_file
from lrc_cli.runtime.places import check_plain, kind_of, place_to_write
from lrc_cli.runtime.processes import ALONE, Processes


@contextmanager
def output_directory(output: Path, *, force: bool, processes: Processes = ALONE) -> Iterator[Path]:
    """A context in which `OUT.partial/` stands for the output, with nothing but the mark in it.

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
        RunError: another run is writing the output, or something that lrc did not make appeared
            under the output's name or a name beside it.
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
                _remove(partial)
            raise


def tidy(output: Path) -> None:
    """Cleans up after a crash between two renames: one whole output is left, and no old copy.

    Raises:
        InputError: `OUT.lrc-old` or `OUT.lrc-lock` is there and is not lrc's.
        RunError: another run is writing the output.
    """
    if _old(output).exists() or (output / PARTIAL_MARK).exists():
        check_names_beside(output)
        with _locked(output):
            _finish(output)


def resolve_output(path: str) -> Path:
    """Returns the absolute path of the output directory; a link stands for its target.

    Raises:
        InputError: the path has no name, is a link to nothing, or cannot be a file's name.
    """
    place_to_write("output.path", path)
    if Path(path).is_symlink() and not Path(path).exists():
        raise InputError(f"output.path: {path} is a link to nothing", "remove it")
    output = Path(path).resolve()
    if not output.name:
        raise InputError(f"output.path: {path!r} is not a directory to write", "choose another one")
    return output


def names_beside(output: Path) -> list[Path]:
    """Returns the paths that lrc uses beside an output: the partial and the old one, the lock."""
    return [_partial(output), _old(output), _lock(output)]


def check_names_beside(output: Path) -> None:
    """Checks that whatever lies under the names beside the output was made by lrc.

    Raises:
        InputError: something lies there that lrc did not make, or a name is too long.
    """
    partial, old, lock = names_beside(output)
    for path in (partial, old):
        kind = kind_of("output.path", path)
        if kind not in (None, "a directory"):
            raise _in_the_way(path, kind)
    # An empty directory holds nothing to lose.
    if not os.path.isfile(partial / PARTIAL_MARK) and _has_content(partial):
        raise _in_the_way(partial)
    if _has_content(old) and (not is_own_output(old) or find_added(old) or find_changed(old)):
        raise _in_the_way(old)
    check_plain("output.path", lock)
    # A lock of lrc's is empty.
    if lock.exists() and lock.stat().st_size:
        raise _in_the_way(lock)


def _in_the_way(path: Path, kind: str | None = None) -> InputError:
    return InputError(
        f"output.path: lrc needs the name {path}, and what lies there"
        f"{f' ({kind})' if kind else ''} was not made by lrc",
        "rename it, or choose another output.path",
    )


def check_output(output: Path, *, force: bool) -> None:
    """Checks before the work begins that the output may be made, or replaced with `force`.

    Args:
        output: the directory to write, from `resolve_output`.
        force: whether an output that lrc wrote may be replaced.

    Raises:
        InputError: nothing can be made there, or the output exists and may not be replaced.
        RunError: another run is writing the output.
    """
    check_writable(output.parent, "output.path")
    check_names_beside(output)
    tidy(output)
    kind = kind_of("output.path", output)
    if kind is None:
        return
    if kind != "a directory":
        raise InputError(
            f"output.path: {output} exists and is {kind}, not a directory",
            "choose another output.path",
        )
    if not is_own_output(output):
        raise InputError(
            f"{output}: the output exists and was not written by lrc", "choose another output.path"
        )
    if not force:
        raise InputError(
            f"{output}: the output exists", "give --force to replace it, or another output.path"
        )
    added = find_added(output)
    if added is not None:
        raise InputError(
            f"{output}: --force would delete {added.relative_to(output)}, which lrc did not write",
            "move it out of the output, or choose another output.path",
        )
    changed = find_changed(output)
    if changed is not None:
        raise InputError(
            f"{output}: --force would delete {changed.relative_to(output)}, which was changed after"
            " lrc wrote it",
            "delete it or move it out of the output, or choose another output.path",
        )


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _old(output: Path) -> Path:
    return output.with_name(output.name + ".lrc-old")


def _lock(output: Path) -> Path:
    return output.with_name(output.name + ".lrc-lock")


def _has_content(directory: Path) -> bool:
    """Whether a directory is there and holds something, or may: its files cannot be listed."""
    try:
        return any(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:
        return True


def _remove(directory: Path) -> None:
    """Deletes a directory that lrc made; what shows who made it goes last, in case of a kill."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (MANIFEST_NAME, PARTIAL_MARK):
            path.unlink()
    shutil.rmtree(directory)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """A context in which no other run can write the output; a killed process frees the lock.

    Raises:
        RunError: another run is writing the output.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    file = _lock(output)
    handle = lock_file(file)
    if handle is None:
        raise RunError(f"{output}: another lrc run is writing it", "wait for it to end")
    try:
        yield
    finally:
        # A lock of lrc's is empty: content is a stranger's.
        if not file.exists() or not file.stat().st_size:
            file.unlink(missing_ok=True)
        handle.close()


def _begin(output: Path) -> None:
    """Makes a marked partial directory; where a crash left two outputs, one whole output stays."""
    try:
        check_names_beside(output)
    except InputError as error:  # it appeared while the run went on
        raise RunError(error.message, error.remedy) from error
    _finish(output)
    partial = _partial(output)
    if partial.exists():
        _remove(partial)
    partial.mkdir()
    (partial / PARTIAL_MARK).touch()


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
        if not is_own_output(output) or find_added(output) or find_changed(output):
            raise RunError(
                f"{output}: something that lrc did not write appeared while the run went on",
                "move it away",
            )
        output.rename(old)
    for directory in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        sync_directory(directory)
    partial.rename(output)
    sync_directory(output.parent)
    (output / PARTIAL_MARK).unlink()
    if is_own_output(old):
        _remove(old)


def _finish(output: Path) -> None:
    """Deletes the old output where a new output is there, and else puts the old output back.

    Where somebody else's directory has taken the name, both stay: `check_output` refuses then.
    """
    old = _old(output)
    if is_own_output(output):
        (output / PARTIAL_MARK).unlink(missing_ok=True)
    if not is_own_output(old):
        return
    if is_own_output(output):
        _remove(old)
    elif not output.exists():
        old.rename(output)
