"""The files that a run was started on, and whether they still are what they were.

A run takes hours, and on a CPU the network's weights are views of mapped files. A file that changes
meanwhile would give an output of two checkpoints, or a report with the hash of other data. So size,
times and inode of every file are noted before the file is read. They are compared before every unit
that is stored and before an output is published. A file of which only the time of its inode is new
has another mode or name, or was written to and had its time set back: its hash tells, once, before
an output is published.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lrc_cli.checkpoint.side_files import MOST_SIDE_FILES
from lrc_cli.checkpoint.source import Source
from lrc_cli.config import Config
from lrc_cli.data.folders import visible_files
from lrc_cli.data.purposes import purposes_of
from lrc_cli.errors import ChangedInput, InputError
from lrc_cli.job.fingerprints import data_hashes
from lrc_cli.network.factories import source_file
from lrc_cli.reading import files_below
from lrc_cli.runtime.file_states import States, check_state, state_of, states_of
from lrc_cli.runtime.processes import Processes

CACHE = "__pycache__"
"""The folder that Python itself may write beside the code of a factory."""
INDEX_SUFFIX = ".index.json"


def states_before(config: Config) -> States:
    """Returns the states of all files that a config may read, before any of them is read.

    Raises:
        InputError: a folder holds so many other files that it must be the wrong one.
    """
    path = Path(config.model.path)
    below = files_below(path, MOST_SIDE_FILES) if os.path.isdir(path) else [path]
    return states_of([*below, *_data_files(config)])


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run was started on.

    Every process has its own object, about the files as they are on its machine.
    """

    config: Config
    source: Source
    checkpoint: States
    """The files of the checkpoint that are read or carried over."""
    data: States
    """The data files, every file of data folders, and the factory's file."""
    data_hashes: Mapping[str, str]
    """The sha256 of every data file or folder and of the factory's code, as they were read."""

    def check_checkpoint(self) -> None:
        """Raises ChangedInput if a file of the checkpoint is not what it was: a few `stat` calls.

        Files that appeared are not looked for.
        """
        for file, state in self.checkpoint.items():
            check_state(file, state, state_of(file))

    def check_own(self) -> None:
        """Raises ChangedInput if a file of this process is not what it was, appeared or is gone."""
        # A copy of the source lists its directory anew.
        now = {*_checkpoint_files(replace(self.source)), *_data_files(self.config)}
        seen = {**self.checkpoint, **self.data}
        for file in sorted(now | set(seen)):
            check_state(file, seen.get(file), state_of(file), self._sha256(file))

    def _sha256(self, file: Path) -> str | None:
        """Returns the hash of a file as it was read; None: nobody took it."""
        if file in self.checkpoint:
            return self.source.hashes.get(self.source.name_of(file))
        return self.data_hashes.get(str(file))

    def check(self, processes: Processes) -> None:
        """Raises ChangedInput in all processes if one of them sees a change."""
        changes = processes.gather(self.change())
        for what in filter(None, changes):
            raise ChangedInput(what)

    def change(self) -> str | None:
        """Returns the first file that is not what it was, with what became of it; None: all are."""
        try:
            self.check_own()
        except ChangedInput as error:
            return error.what
        except InputError as error:  # a folder cannot be listed any more
            return error.message
        return None


def look_at_inputs(config: Config, source: Source, before: States) -> Inputs:
    """Returns the inputs of a run.

    Args:
        source: the opened checkpoint.
        before: from `states_before`, before the checkpoint was opened. A file that has appeared
            since then counts as changed.
    """
    factory = None if config.model.factory is None else source_file(config.model.factory)
    return Inputs(
        config=config,
        source=source,
        checkpoint={file: before.get(file) for file in _checkpoint_files(source)},
        data={file: before.get(file) for file in _data_files(config)}
        | states_of([] if factory is None else [factory]),
        data_hashes=data_hashes(config),
    )


def _checkpoint_files(source: Source) -> list[Path]:
    """Returns the files of a checkpoint that are there now and are read or carried over."""
    if not source.path.is_dir():
        return [source.path]
    config = [] if source.config is None else [source.path / "config.json"]
    indices = sorted(source.path.glob(f"*{INDEX_SUFFIX}"))
    side_files = [file for file in source.side_files() if CACHE not in file.parts]
    return [*config, *indices, *source.files, *side_files]


def _data_files(config: Config) -> list[Path]:
    """Returns the data files that are there now, and the visible files of data folders."""
    found: dict[Path, None] = {}
    for path in dict.fromkeys(purpose.path for purpose in purposes_of(config)):
        # Unlike Path.is_dir, this says no where a name is too long for the system.
        if os.path.isdir(path):
            found |= dict.fromkeys(filter(Path.is_file, visible_files(path)))
        else:
            found[path] = None
    return list(found)
