"""Jobs of one config at several sizes run here; finished outputs are left as they are."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lrc_cli.config import Config
from lrc_cli.job.fingerprints import already_done
from lrc_cli.job.run import compress_each
from lrc_cli.report.gates import check_gates
from lrc_cli.report.record import Record, read_record
from lrc_cli.runtime.processes import ALONE, Processes
from lrc_cli.runtime.progress import Progress


def run_jobs(
    configs: Sequence[Config],
    *,
    force: bool,
    restart: bool,
    progress: Progress,
    processes: Processes = ALONE,
) -> Iterator[tuple[Config, Record]]:
    """Yields every job with its record, after running the jobs whose output is not finished.

    With `force` or `restart` every job is run.

    Args:
        configs: jobs that differ in `compression.size` and `output.path` only.
        processes: the processes that share the work. Each process calls this.
    """
    again = force or restart
    done = processes.from_first(lambda: [not again and already_done(x) for x in configs])
    missing = [config for config, is_done in zip(configs, done, strict=True) if not is_done]
    new = compress_each(
        missing, force=force, restart=restart, progress=progress, processes=processes
    )
    for config, is_done in zip(configs, done, strict=True):
        if not is_done:
            yield config, next(new)
            continue
        directory = Path(config.output.path)
        if processes.is_first:
            progress.say(f"{directory}: already what the config asks for")
        record = processes.from_first(partial(read_record, directory))
        yield config, replace(record, gates=check_gates(config.gates, record))
