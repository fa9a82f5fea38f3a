"""The places of a job, checked against one another before any work.

A job reads a checkpoint, data and a config. It writes an output, a work directory and perhaps a
JUnit file. No place to write lies in a place to read, and no two places to write share a file.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from lrc_cli.checkpoint.output_directory import check_names_beside, names_beside, resolve_output
from lrc_cli.checkpoint.side_files import MOST_SIDE_FILES
from lrc_cli.config import Config, check_written
from lrc_cli.errors import InputError
from lrc_cli.job.work import FACTORS, FINGERPRINT, LOCK, LOG, PASSING, RECOVERED, SHARED
from lrc_cli.reading import files_below, read_json
from lrc_cli.report.junit import check_junit_path
from lrc_cli.runtime.files import check_writable
from lrc_cli.runtime.places import (
    Place,
    check_apart,
    check_name,
    check_outside,
    check_plain,
    place_to_read,
    place_to_write,
)

OUTPUT, WORK_DIR, JUNIT = "output.path", "runtime.work_dir", "--junit"
CONFIG, CHECKPOINT = "the config", "the checkpoint"
WORK_FILES = (LOCK, LOG, FINGERPRINT)
WORK_FOLDERS = (*PASSING, *SHARED, FACTORS, RECOVERED)
FIELDS = frozenset({"checkpoint", "calibration data", "lrc version"})
"""Some of the fields that every fingerprint of lrc's has."""
MOST_BYTES = 1 << 28


def check_places(
    configs: Sequence[Config], *, config_file: Path | None = None, junit: Path | None = None
) -> None:
    """Checks every place that jobs will write, and touches none of them.

    Args:
        configs: jobs that differ in the target and in `output.path` only.
        config_file: the file that the configs were read from; None: no file.
        junit: the JUnit file to write; None: none is written.

    Raises:
        InputError: a place lies in another place, something that lrc did not make has the name, or
            lrc could not read the config again.
    """
    read = _places_to_read(configs[0], config_file)
    outputs = _checked_outputs(configs, read)
    work = _checked_work_root(configs[0], [*read, *outputs])
    for config in configs:
        check_written(config)
    if junit is not None:
        _check_junit(junit, [*read, *outputs, work], outputs)


def _places_to_read(config: Config, config_file: Path | None) -> list[Place]:
    for name, path in _read_by(config):
        check_name("model.path" if name == CHECKPOINT else name, path)
    places = [place_to_read(name, path) for name, path in _read_by(config)]
    places += [place for name, path in _read_by(config) for place in _linked(name, path)]
    if config_file is not None:
        places.append(place_to_read(CONFIG, config_file))
    return [place for place in places if place is not None]


def _linked(name: str, path: str) -> list[Place]:
    """The files elsewhere that links in a folder lead to, one for each folder that holds some.

    A place to write that holds one of them would take a part of what is read with it.
    """
    if not os.path.isdir(path):
        return []
    files = files_below(Path(path), MOST_SIDE_FILES)
    # Unlike Path.is_file, this says no where a link may not be followed.
    links = sorted(file for file in files if os.path.islink(file) and os.path.isfile(file))
    found = {file.parent: file for file in (Path(os.path.realpath(link)) for link in links)}
    return [Place(name=name, path=file) for file in found.values()]


def _checked_outputs(configs: Sequence[Config], read: Sequence[Place]) -> list[Place]:
    """The outputs and the names beside them, none of which lies in another or in what is read."""
    others: list[Place] = []
    # A finished output may be read again: its own lrc.yaml is a config, too.
    kept = [place for place in read if place.name != CONFIG]
    for config in configs:
        output = resolve_output(config.output.path)
        paths = [output, *names_beside(output)]
        for path in paths:
            place = Place(name=OUTPUT, path=path)
            check_outside(place, [*read, *others])
            check_apart(place, kept)
        check_names_beside(output)
        others += [Place(name="another output", path=path) for path in paths]
    return [Place(name="the output", path=place.path) for place in others]


def _checked_work_root(config: Config, others: Sequence[Place]) -> Place:
    root = work_root(config)
    work = place_to_write(WORK_DIR, root)
    check_outside(work, others)
    # The work directory may hold other things, as long as no name of its own is taken.
    for name in (*WORK_FILES, *WORK_FOLDERS):
        check_apart(Place(name=WORK_DIR, path=work.path / name), others)
    if root.exists() and not root.is_dir():
        check_writable(root, WORK_DIR)
    if config.runtime.work_dir is not None:
        check_work_directory(root)
    return Place(name="the work directory", path=work.path)


def _check_junit(junit: Path, others: Sequence[Place], outputs: Sequence[Place]) -> None:
    check_plain(JUNIT, junit)
    file = place_to_write(JUNIT, junit)
    # The manifest of an output names every file in it: a JUnit file would make it false.
    if any(file.path.is_relative_to(place.path) for place in outputs):
        raise InputError(f"{JUNIT}: {file.path} lies in the output directory", "give another path")
    check_apart(file, others)
    check_junit_path(junit)


def work_root(config: Config) -> Path:
    """The work directory of a config, or the directory of all work directories that it may have."""
    given = config.runtime.work_dir
    return Path(given) if given else resolve_output(config.output.path).parent / ".lrc-work"


def work_directory(config: Config, identity: str) -> Path:
    """The work directory: `runtime.work_dir`, or a hidden one beside the output.

    Args:
        identity: the digest of the statistics' fingerprint.
    """
    root = work_root(config)
    return root if config.runtime.work_dir else root / identity[:16]


def check_work_directory(root: Path) -> None:
    """Checks that nothing of a stranger's has a name that a work directory needs.

    A directory is lrc's only if its fingerprint.json is. In any other directory the names that lrc
    needs must be free.

    Raises:
        InputError: a stranger's file or folder, a link or a pipe has such a name.
    """
    for name in WORK_FILES:
        check_plain(WORK_DIR, root / name, shared=False)
    if _is_own(root / FINGERPRINT):
        _check_folders(root)
    else:
        _check_names_are_free(root)


def _check_folders(root: Path) -> None:
    """Checks that no stage is a link: units would be written, and deleted, somewhere else."""
    stages = [root / name for name in WORK_FOLDERS]
    for name in (FACTORS, RECOVERED):
        if (root / name).is_dir():
            stages += sorted((root / name).iterdir())
    for path in stages:
        if path.is_symlink():
            raise InputError(
                f"{WORK_DIR}: {path} is a link, and lrc needs a directory there",
                f"remove it, or choose another {WORK_DIR}",
            )


def _check_names_are_free(root: Path) -> None:
    for name in (FINGERPRINT, LOG, *WORK_FOLDERS):
        if os.path.lexists(root / name):
            raise InputError(
                f"{WORK_DIR}: {root / name} was not made by lrc: no fingerprint.json of lrc's lies"
                " beside it",
                f"choose another {WORK_DIR}",
            )


def _is_own(file: Path) -> bool:
    """Whether a fingerprint.json has the fields of lrc's."""
    try:
        return read_json(file).keys() >= FIELDS
    except InputError:  # none, or none that lrc wrote
        return False


def _read_by(config: Config) -> Iterator[tuple[str, str]]:
    """Everything that a job reads, with the words for it."""
    yield CHECKPOINT, config.model.path
    yield "the data of calibration.path", config.calibration.path
    if config.certification is not None and config.certification.path is not None:
        yield "the data of certification.path", config.certification.path
    if config.recover.is_used and config.recover.path is not None:
        yield "the data of recover.path", config.recover.path
    for number, text in enumerate(config.evaluation or ()):
        yield f"the data of evaluation.{number}.path", text.path
