"""The jobs of one `compress` command: which are done already, and what all came to."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lrc_cli.config import Config
from lrc_cli.errors import StrictFallback
from lrc_cli.job.fingerprints import already_done
from lrc_cli.job.output.write import read_report
from lrc_cli.job.run import compress_each
from lrc_cli.report.facts import not_as_asked
from lrc_cli.report.gates import check_gates, check_gates_possible, fail_if_missed
from lrc_cli.report.junit import check_junit_path, write_junit
from lrc_cli.runtime.processes import ALONE, Processes
from lrc_cli.runtime.progress import Progress

Report = dict[str, Any]


def check_jobs(configs: Sequence[Config], junit: Path | None) -> None:
    """Raise InputError for gates that nothing measures and for a JUnit file that cannot be."""
    check_gates_possible(configs[0])
    for config in configs:
        if junit is not None:
            check_junit_path(junit, Path(config.output.path))


def run_jobs(
    configs: Sequence[Config],
    *,
    force: bool,
    restart: bool,
    progress: Progress,
    processes: Processes = ALONE,
) -> Iterator[tuple[Config, Report]]:
    """Every job with its report; without `force` and `restart`, finished ones are not run again.

    Args:
        configs: jobs that differ in `compression.size` and `output.path` only.
        processes: those that share the work, each of which calls this.
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
        report = processes.from_first(partial(read_report, directory))
        report["gates"] = check_gates(config.gates, report)
        yield config, report


def conclude(reports: Sequence[Report], junit: Path | None, *, strict: bool) -> None:
    """Write the JUnit file, then fail for what the reports say.

    Raises:
        GateMissed: in any of the jobs.
        StrictFallback: with `strict`, where a layer fell back in any of them.
    """
    if junit is not None:
        write_junit(junit, reports, strict=strict)
    fail_if_missed(*reports)
    fallen = [layer["name"] for report in reports for layer in not_as_asked(report)]
    if strict and fallen:
        raise StrictFallback(
            f"{len(fallen)} layers fell back, the first is {fallen[0]}", "see report.json"
        )


def summary(report: Report) -> str:
    """What a run came to, in a few lines."""
    size = report["size"]
    lines = [
        f"kept {size['kept_compressible']:.1%} of the compressible weights,"
        f" {size['kept_checkpoint']:.1%} of the checkpoint's bytes"
    ]
    for row in report["quality"]:
        if "perplexity_after" in row:
            before, after = row["perplexity_before"], row["perplexity_after"]
            lines.append(f"{row['text']}: perplexity {before:.2f} -> {after:.2f}")
        else:
            lines.append(f"{row['text']}: relative output error {row['relative_output_error']:.3f}")
    if report["certificate"]["statements"]:
        from lrc_cli.quality.sentences import main_statements

        lines += ["certificate:", *(f"- {x}" for x in main_statements(report["certificate"]))]
    return "\n".join(lines)
