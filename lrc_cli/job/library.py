"""`lrc_cli.compress` runs a job for a program: whatever fails is an error of lrc's own."""

from typing import Any

from lrc_cli.config import Config
from lrc_cli.errors import RunError
from lrc_cli.job.places import check_places
from lrc_cli.job.run import compress as run_job
from lrc_cli.runtime.processes import ALONE, Processes
from lrc_cli.runtime.progress import Progress
from lrc_cli.runtime.strangers import answering_with


@answering_with(RunError)
def compress(
    config: Config,
    *,
    force: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Compresses the checkpoint that the config names and writes the output directory.

    Args:
        config: the job, such as `lrc_cli.config.load_config` returns.
        force: whether an existing output is replaced.
        restart: whether finished units of earlier runs are dropped first.
        progress: the display; None: standard error.
        processes: the processes that share the work. Each process calls this.

    Returns:
        The record, as in report.json.

    Raises:
        InputError: the config or the data cannot be used; nothing was written.
        RunError: the run failed; finished units stay in the work directory.
    """
    processes.from_first(lambda: check_places([config]))
    return run_job(config, force=force, restart=restart, progress=progress, processes=processes)
