"""A forecast becomes text for people here."""

from typing import Any

from lrc_cli.text import byte_size, count, percent, visible_lines

Forecast = dict[str, Any]


def render(found: Forecast) -> str:
    """Returns the forecast as text, in a few tables."""
    lines = [
        f"{found['checkpoint']}: {found['layers']} layers in {found['blocks']} units,"
        f" on {found['device']}",
        *(
            [f"runs whole, not block by block: {found['runs_whole']}"]
            if found["runs_whole"]
            else []
        ),
        f"work directory: {found['work_dir']}",
        *_calibration(found["calibration"]),
        "",
        "estimated from a measured probe:",
        *(f"  {name:<16}{_duration(value):>10}" for name, value in found["seconds"].items()),
        f"  {'total':<16}{_duration(found['total_seconds']):>10}",
        *_memory(found["memory"]),
        *(
            f"  disk, {disk['key']}: {byte_size(disk['needed'])} of {byte_size(disk['free'])} free"
            for disk in found["disk"]
        ),
        "",
        *(line for job in found["jobs"] for line in _job(job)),
    ]
    if "curve" in found:
        lines += ["", *_curve(found)]
    return visible_lines(lines)


def _calibration(found: dict[str, Any]) -> list[str]:
    """Returns the amount of calibration data, and what more of it would bring."""
    if not found:
        return []
    each = found["rows"] / found["inputs"]
    lines = [
        f"calibration: {count(found['num_sequences'])} sequences; {found['layer']} gets"
        f" {count(found['rows'])} rows, {each:.3g} for each of its {count(found['inputs'])} inputs"
    ]
    if found.get("left") == 0:
        lines.append("  the data has no more sequences")
    if "twice" in found:
        more, less = percent(found["unseen"]), percent(found["twice"])
        lines.append(
            f"  on {found['others']} other sequences the error is {more} larger; twice as many"
            f" would lower it there by about {less}"
        )
    return lines


def _memory(memory: dict[str, Any]) -> list[str]:
    peak, available = byte_size(memory["peak"]), byte_size(memory["available"])
    lines = [f"  private memory at the peak: {peak} of {available}"]
    if memory["gpu_peak"]:
        lines.append(f"  GPU memory at the peak: {byte_size(memory['gpu_peak'])}")
    return lines


def _job(job: dict[str, Any]) -> list[str]:
    target, seconds = job["target"], sum(job["seconds"].values())
    lines = [
        f"{target['name']} {target['value']:g} -> {job['output']}:"
        f" {byte_size(job['checkpoint_bytes'])}, {_duration(seconds)} of its own"
    ]
    if job["recover"] is not None:
        lines += _training(job["recover"])
    if "ranks" in job:
        ranks = [*job["ranks"].values()]
        kept, dense = [rank for rank in ranks if rank], ranks.count(0)
        span = f"ranks {min(kept)} to {max(kept)}" if kept else "no layer is factorised"
        lines.append(f"  {span}, {dense} layers stay dense; {_errors(job)}")
    return lines


def _training(found: dict[str, Any]) -> list[str]:
    numbers = {name: count(x) for name, x in found.items() if isinstance(x, int)}
    each = " a block" if found["scope"] == "block" else ""
    lines = [
        f"  training: {numbers['steps']} steps{each}, {numbers['tokens']} tokens,"
        f" {numbers['num_sequences']} sequences, {numbers['num_held_out']} held out"
    ]
    if "reason" in found:
        lines.append(f"  recover.scope: auto takes {found['scope']}: {found['reason']}")
    return lines


def _curve(found: Forecast) -> list[str]:
    where = "of the work directory" if found["spectra"] == "reused" else "just collected"
    lines = [f"size and predicted error, before rounding, from the spectra {where}:"]
    return lines + [f"  {point['size']:<6g}{_errors(point)}" for point in found["curve"]]


def _errors(point: dict[str, Any]) -> str:
    text = f"relative error {point['relative_error']:.4f}"
    if "loss_increase" in point:
        text += f", loss increase {point['loss_increase']:.4g}"
    return text


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
