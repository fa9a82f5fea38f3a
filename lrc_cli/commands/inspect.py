"""`lrc inspect` shows what a checkpoint holds, and what of it would be compressed."""

from pathlib import Path
from typing import Any

import click

from lrc_cli.commands.exits import Command
from lrc_cli.commands.options import (
    PATH,
    examples,
    factory_option,
    json_option,
    state_dict_option,
    trust_option,
)
from lrc_cli.commands.setup import calm_transformers
from lrc_cli.runtime.streams import deliver, deliver_json
from lrc_cli.text import visible_lines


@click.command(
    cls=Command, epilog=examples("lrc inspect models/llama", "lrc inspect models/llama --json")
)
@click.argument("checkpoint", type=PATH)
@factory_option
@trust_option
@state_dict_option
@json_option
def inspect(checkpoint: Path, as_json: bool, **options: Any) -> None:
    """Show what of CHECKPOINT would be compressed, and what not and why."""
    calm_transformers()
    from lrc_cli.network.inventory import inspect_checkpoint

    found = inspect_checkpoint(checkpoint, **options)
    if as_json:
        deliver_json(found)
    else:
        deliver(render_inspection(found))


def render_inspection(found: dict[str, Any]) -> str:
    """Returns the text for people: layers of one shape on a line, skipped tensors by reason."""
    share = found["compressible_bytes"] / found["bytes"]
    lines = [
        *found["notes"],
        f"{found['checkpoint']}: {found['architecture']}, {found['bytes'] / 1e6:.1f} MB"
        f" in {len(found['files'])} file(s)",
        f"compressible: {len(found['layers'])} layers, {share:.1%} of the bytes",
    ]
    groups: dict[tuple[str, ...], list[int]] = {}
    for layer in found["layers"]:
        leaf = layer["name"].rpartition(".")[2]
        m, n = layer["shape"]
        groups.setdefault((leaf, layer["kind"], f"{m} x {n}", layer["dtype"]), []).append(
            layer["bytes"]
        )
    for (leaf, kind, shape, dtype), sizes in groups.items():
        lines.append(
            f"  {len(sizes):4d} x {leaf:<16} {kind:<8} {shape:<14} {dtype:<9}"
            f" {sum(sizes) / 1e6:9.1f} MB"
        )
    lines.append("left as it is:")
    reasons: dict[str, list[int]] = {}
    for skipped in found["skipped"]:
        reasons.setdefault(skipped["reason"], []).append(skipped["bytes"])
    for reason, sizes in reasons.items():
        lines.append(f"  {len(sizes):4d} x {reason:<42} {sum(sizes) / found['bytes']:7.1%}")
    return visible_lines(lines)
