"""These functions damage a finished output, and rewrite its manifest so that hashes do not tell."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report_helpers import assumptions, render_card, render_html, statement_text
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lrc_cli.checkpoint.manifest import build_manifest

Mutation = Callable[[Path], None]


def rewrite_manifest(output: Path) -> None:
    """Makes every hash fit again, as somebody does who hides a change."""
    manifest = build_manifest(output)
    (output / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def rewrite_pages(output: Path) -> None:
    """Makes the card and the page say what report.json says now."""
    report = read_report(output)
    (output / "README.md").write_bytes(render_card(report).encode())
    (output / "report.html").write_bytes(render_html(report).encode())


def copied(output: Path, directory: Path) -> Path:
    """Returns a copy of an output that a test may damage."""
    return Path(shutil.copytree(output, directory / "out"))


def read_report(output: Path) -> dict[str, Any]:
    """Returns report.json."""
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def edit_report(output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes report.json, in the form in which it is written."""
    report = read_report(output)
    change(report)
    write_report(output, report)


def write_report(output: Path, report: dict[str, Any]) -> None:
    """Writes report.json, in the form in which lrc writes it."""
    (output / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def edit_tensors(
    output: Path, key: str, change: Callable[[Tensor], Tensor], name: str | None = None
) -> None:
    """Changes one tensor, and its name if one is given, in the shard that holds it."""
    for file in sorted(output.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            metadata, keys = handle.metadata(), list(handle.keys())
            if key not in keys:
                continue
            tensors = {k: handle.get_tensor(k).clone() for k in keys}
        tensors[name or key] = change(tensors.pop(key)).contiguous()
        save_file(tensors, file, metadata=metadata)


def factor_key(output: Path) -> str:
    """Returns the disk name of a layer with a permutation whose row groups differ."""
    for file in sorted(output.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (a handle is not a mapping)
                if key.endswith(".perm") and len(handle.get_tensor(key)) > 2:
                    return str(key.removesuffix(".perm"))
    raise AssertionError("no layer is interpolative")


def first_factorised(report: dict[str, Any]) -> dict[str, Any]:
    """Returns the report's first layer with factors."""
    layer: dict[str, Any] = next(x for x in report["layers"] if x["storage"] != "dense")
    return layer


# ---------------------------------------------------------------- one change each


def flip_a_bit(output: Path) -> None:
    """Flips the lowest bit of one number of a factor."""

    def change(tensor: Tensor) -> Tensor:
        flat = tensor.flatten().view(torch_uint8())
        flat[0] ^= 1
        return flat.view(tensor.dtype).view(tensor.shape)

    edit_tensors(output, f"{factor_key(output)}.weight", change)


def flip_a_high_bit(output: Path) -> None:
    """Flips a high bit of the exponent of one number of a factor, which stays finite."""

    def change(tensor: Tensor) -> Tensor:
        flat = tensor.flatten()
        flat[0] = 64.0
        return flat.view(tensor.shape)

    edit_tensors(output, f"{factor_key(output)}.weight", change)


def change_a_kept_tensor(output: Path) -> None:
    """Changes one number of a tensor that was never compressed."""

    def change(tensor: Tensor) -> Tensor:
        flat = tensor.flatten()
        flat[3] += 1.0
        return flat.view(tensor.shape)

    edit_tensors(output, "model.norm.weight", change)


def torch_uint8() -> Any:
    """Returns the dtype of bytes."""
    import torch

    return torch.uint8


def swap_the_permutation(output: Path) -> None:
    """Swaps two entries of a permutation: it is still one, but of another matrix."""

    def change(tensor: Tensor) -> Tensor:
        return tensor[[1, 0, *range(2, len(tensor))]]

    edit_tensors(output, f"{factor_key(output)}.perm", change)


def repeat_in_the_permutation(output: Path) -> None:
    """Repeats an entry, so that there is no permutation any more."""

    def change(tensor: Tensor) -> Tensor:
        tensor[0] = tensor[1]
        return tensor

    edit_tensors(output, f"{factor_key(output)}.perm", change)


def rename_a_key(output: Path) -> None:
    """Gives one tensor of a layer another name, in the index too."""
    old = f"{factor_key(output)}.up.weight"
    new = old.replace(".up.", ".down.")
    edit_tensors(output, old, lambda tensor: tensor, new)
    index = output / "model.safetensors.index.json"
    if index.exists():
        index.write_text(index.read_text().replace(f'"{old}"', f'"{new}"'))


def drop_a_shard(output: Path) -> None:
    """Drops the last weight file."""
    sorted(output.glob("*.safetensors"))[-1].unlink()


def drop_a_shard_and_its_entries(output: Path) -> None:
    """Drops the last weight file, and all that the index says of it."""
    shard = sorted(output.glob("*.safetensors"))[-1]
    shard.unlink()
    file = output / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != shard.name}
    file.write_text(json.dumps(index, indent=2) + "\n")


def change_a_rank(output: Path) -> None:
    """Changes one rank in the layer table."""
    file = output / "config.json"
    config = json.loads(file.read_text())
    next(iter(config["quantization_config"]["layers"].values()))["rank"] += 8
    file.write_text(json.dumps(config, indent=2) + "\n")


def rename_storages(output: Path, *, layers: int | None) -> None:
    """Gives layers of the layer table a form that `lrc verify` does not know.

    Args:
        layers: the number of layers from the first; None: all.
    """
    file = output / "config.json"
    config = json.loads(file.read_text())
    for entry in list(config["quantization_config"]["layers"].values())[:layers]:
        entry["storage"] = "foo"
    file.write_text(json.dumps(config, indent=2) + "\n")


def rename_a_storage(output: Path) -> None:
    """Renames the form of one layer in config.json alone."""
    rename_storages(output, layers=1)


def rename_a_storage_everywhere(output: Path) -> None:
    """Renames the form of one layer in config.json, in the report and on the pages."""
    config = json.loads((output / "config.json").read_text())
    first = next(iter(config["quantization_config"]["layers"]))

    def change(report: dict[str, Any]) -> None:
        next(x for x in report["layers"] if x["name"] == first)["storage"] = "foo"

    rename_storages(output, layers=1)
    edit(change)(output)


def rename_all_storages_everywhere(output: Path) -> None:
    """Renames the form of every layer in config.json, in the report and on the pages."""

    def change(report: dict[str, Any]) -> None:
        for layer in report["layers"]:
            if layer["storage"] != "dense":
                layer["storage"] = "foo"

    rename_storages(output, layers=None)
    edit(change)(output)


def change_the_heads(output: Path) -> None:
    """Changes one key of config.json that lrc carries over."""
    file = output / "config.json"
    config = json.loads(file.read_text())
    config["rms_norm_eps"] = 0.5
    file.write_text(json.dumps(config, indent=2) + "\n")


def better_size(report: dict[str, Any]) -> None:
    """Improves a ratio."""
    report["size"]["kept_checkpoint"] *= 0.9


def better_layer_error(report: dict[str, Any]) -> None:
    """Improves one layer's error consistently, with its optimum, and in the layer's reason."""
    layer = first_factorised(report)
    errors, stored = layer["errors"], layer["errors"]["metric"]["stored"]
    layer["reason"] = layer["reason"].replace(f": {stored:.3g} ", f": {stored * 0.81:.3g} ")
    for kind in ("metric", "output"):
        for key in ("stored", "optimum", "svd"):
            errors[kind][key] *= 0.9 if kind == "output" else 0.81


def better_metric(report: dict[str, Any]) -> None:
    """Improves one layer's error in the metric that was minimised."""
    layer = next(x for x in report["layers"] if x["method"] == "relu" and x["storage"] != "dense")
    layer["errors"]["metric"]["stored"] *= 0.9


def other_simple_metric(report: dict[str, Any]) -> None:
    """Makes plain SVD's error larger than it is."""
    layer = next(x for x in report["layers"] if x["method"] == "relu" and x["storage"] != "dense")
    layer["errors"]["metric"]["svd"] *= 1.1


def better_worst_case(report: dict[str, Any]) -> None:
    """Improves the worst-case bound."""
    report["worst_case"]["bound"] *= 0.95


def better_measured_change(report: dict[str, Any]) -> None:
    """Improves the largest change that was measured beside the worst-case bound."""
    report["worst_case"]["measured"] *= 0.95


def better_amplification(report: dict[str, Any]) -> None:
    """Improves the factor by which a layer's own error may grow."""
    report["worst_case"]["layers"][0]["amplification"] *= 0.95


def other_share(report: dict[str, Any]) -> None:
    """Sets shares of the corrections that can be, but do not pay best."""
    for layer in report["layers"]:
        if layer.get("sequential") is True:
            layer["correction"] = (layer["correction"] + 0.5) % 1


def other_correction(report: dict[str, Any]) -> None:
    """Sets a share of the correction that cannot be."""
    for layer in report["layers"]:
        if layer.get("sequential") is True:
            layer["correction"] = 1.5


def better_than_optimal(report: dict[str, Any]) -> None:
    """Improves one layer's error alone."""
    first_factorised(report)["errors"]["output"]["stored"] *= 0.5


def better_quality(report: dict[str, Any]) -> None:
    """Improves a loss with its perplexity."""
    import math

    row = report["quality"][0]
    row["loss_after"] = (row["loss_before"] + row["loss_after"]) / 2
    row["perplexity_after"] = math.exp(row["loss_after"])


def better_perplexity(report: dict[str, Any]) -> None:
    """Improves a perplexity alone."""
    report["quality"][0]["perplexity_after"] *= 0.9


def better_divergence(report: dict[str, Any]) -> None:
    """Improves a figure that no other figure tells."""
    report["quality"][0]["kl"] *= 0.9


def better_bound(report: dict[str, Any]) -> None:
    """Improves the bound of a mean, in its sentence too."""
    certificate = report["certificate"]
    statement = next(s for s in certificate["statements"] if s["kind"] == "mean")
    statement["bound"] *= 0.9
    statement["text"] = statement_text(statement, certificate)


def better_values(report: dict[str, Any]) -> None:
    """Improves the largest per-sequence value, which the limits of its statements do not show."""
    values = report["certificate"]["values"]["all_layers"]
    values[values.index(max(values))] *= 0.8


def restate(certificate: dict[str, Any]) -> None:
    """Makes every sentence follow from the certificate's figures again."""
    for statement in certificate["statements"]:
        statement["text"] = statement_text(statement, certificate)
    certificate["assumptions"] = assumptions(certificate)


def other_words(report: dict[str, Any]) -> None:
    """States more selection data than there were, and other predictions, in every sentence."""
    certificate = report["certificate"]
    certificate["selection"]["num_tokens"] *= 10
    certificate["predictions"] = "predictions of masked tokens"
    restate(certificate)


def better_sentence(report: dict[str, Any]) -> None:
    """Improves one certificate sentence."""
    statement = report["certificate"]["statements"][0]
    statement["text"] = statement["text"].replace("95 %", "99 %")


def held_out_figure(report: dict[str, Any]) -> None:
    """Changes one layer's error on certification data."""
    first_factorised(report)["errors"]["held_out"]["same_input"] *= 0.9


def edit(change: Callable[[dict[str, Any]], None]) -> Mutation:
    """Returns a change of report.json that the pages show as well."""

    def mutate(output: Path) -> None:
        edit_report(output, change)
        rewrite_pages(output)

    return mutate


def edit_the_card(output: Path) -> None:
    """Changes a sentence of README.md."""
    file = output / "README.md"
    file.write_text(file.read_text().replace("95 %", "99 %", 1))


def edit_the_page(output: Path) -> None:
    """Changes a sentence of report.html."""
    file = output / "report.html"
    file.write_text(file.read_text().replace("95 %", "99 %", 1))


def edit_the_config(output: Path) -> None:
    """Makes lrc.yaml tell of another run."""
    file = output / "lrc.yaml"
    file.write_text(file.read_text().replace("ridge: 0.01", "ridge: 0.02"))


def add_a_file(output: Path) -> None:
    """Adds code that came from nowhere."""
    (output / "modeling_extra.py").write_text("print('hello')\n")


def edit_the_licence(output: Path) -> None:
    """Changes a side file."""
    (output / "LICENSE").write_text("not free to use\n")


def edit_metadata(file: Path, old: str, new: str) -> None:
    """Changes what lrc noted in a weight file's header."""
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
        tensors = {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118
    assert old in metadata["lrc"]
    save_file(tensors, file, metadata=metadata | {"lrc": metadata["lrc"].replace(old, new)})
