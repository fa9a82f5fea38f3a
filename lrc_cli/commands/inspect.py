"""`lrc inspect`: what a checkpoint holds and what would be compressed, from its headers."""

from pathlib import Path
from typing import Any

from lrc_cli.checkpoint.source import open_source
from lrc_cli.config import Compression
from lrc_cli.network.candidates.find import find_layers
from lrc_cli.network.factories import ask_for_factory
from lrc_cli.network.opening import open_module


def inspect_checkpoint(
    path: Path, *, factory: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The layers that the default config would compress, and every other tensor with the reason.

    Args:
        path: a dense checkpoint.
        factory: builds the module of a checkpoint that is not transformers'.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        InputError: the checkpoint cannot be opened.
    """
    source = open_source(path)
    if factory is None and source.config is None:
        raise ask_for_factory(path)
    module, source = open_module(source, factory=factory, trust_remote_code=trust_remote_code)
    layers, skipped = find_layers(module, source, Compression(size=0.8))
    total = source.num_bytes
    return {
        "checkpoint": str(path),
        "architecture": type(module).__name__,
        "files": [file.name for file in source.files],
        "bytes": total,
        "compressible_bytes": sum(layer.num_bytes for layer in layers),
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "dtype": str(layer.dtype).removeprefix("torch."),
                "bytes": layer.num_bytes,
            }
            for layer in layers
        ],
        "skipped": [
            {"name": s.name, "reason": s.reason, "bytes": s.num_bytes, "share": s.num_bytes / total}
            for s in skipped
        ],
    }


def render_inspection(found: dict[str, Any]) -> str:
    """For people: layers of one shape on a line, skipped tensors by reason."""
    share = found["compressible_bytes"] / found["bytes"]
    lines = [
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
    return "\n".join(lines)
