"""The original must be the recorded checkpoint, and its unchanged parts must be in the output."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrc_cli.checkpoint.choice import NAMED
from lrc_cli.checkpoint.headers import TensorInfo
from lrc_cli.checkpoint.source import Source, open_source
from lrc_cli.checkpoint.wrapped import unwrapped_names
from lrc_cli.config import Model
from lrc_cli.errors import InputError
from lrc_cli.execution.precision import DTYPES
from lrc_cli.network.candidates.find import find_layers
from lrc_cli.network.disk_names import stored_names
from lrc_cli.network.factories import ask_for_factory, source_file
from lrc_cli.network.keys import Keys
from lrc_cli.network.layer import Layer
from lrc_cli.network.layouts import layout_of, linear_shape
from lrc_cli.network.norms import norms_by_key
from lrc_cli.network.opening import Opened, open_module
from lrc_cli.reading import read_json
from lrc_cli.verify.files.forms import UP, unread
from lrc_cli.verify.files.manifest import is_inside, sha256_of
from lrc_cli.verify.files.reasons import is_of_use
from lrc_cli.verify.files.written import Written, fused_of
from lrc_cli.verify.methods import KNOWN
from lrc_cli.verify.statements import Findings


def open_original(
    against: Path, factory: str | None, recorded: Model, state_dict: str | None
) -> Source:
    """Opens the dense checkpoint.

    Args:
        against: the path.
        factory: the factory that was given.
        recorded: what the output's lrc.yaml says of the checkpoint.
        state_dict: the state dict that was given; None: as recorded.

    Raises:
        InputError: the checkpoint is missing, not dense, or needs a factory that was not given.
    """
    chosen = recorded.state_dict if state_dict is None else state_dict
    source = open_source(against, state_dict=chosen)
    if source.config is None and factory is None:
        raise ask_for_factory(source.path, recorded.factory)
    return source


def check_state_dict(written: Written, given: str | None, findings: Findings) -> None:
    """The run must have compressed the state dict that --state-dict names."""
    if given is not None and written.config is not None:
        what = "--state-dict is the state dict that was compressed"
        findings.equal("original.state_dict", what, written.config.model.state_dict, given)


def check_original(written: Written, original: Source, findings: Findings) -> bool:
    """Checks hashes, tensors and side files; returns whether it is the recorded checkpoint."""
    assert written.report is not None
    recorded = written.report["provenance"]["checkpoint_sha256"]
    same = _check_hashes(recorded, original, findings)
    if same:
        with findings.guard("original.tensors", "the unchanged tensors can be compared"):
            _check_tensors(written, original, findings)
        with findings.guard("original.files", "the side files can be compared"):
            _check_side_files(written, original, recorded, findings)
    return same


def _check_hashes(recorded: dict[str, str], original: Source, findings: Findings) -> bool:
    """Every recorded file must have its hash, and no other weight file may be there."""
    single = original.path.is_file()
    weights = {original.name_of(file) for file in original.decisive}
    same = True
    for name, sha256 in recorded.items():
        file = original.path if single and len(recorded) == 1 else original.path / name
        what = f"the original's {name} has the hash in the report"
        if not is_inside(name) or not file.is_file():
            problem: str | None = "the file is missing"
        else:
            found = sha256_of(file)
            problem = None if found == sha256 else f"stated {sha256}, found {found}"
        holds = findings.judge("original.hash", what, problem)
        # A licence or a card may have changed since; the network is still the same.
        same &= holds or not (single or name in weights or name.endswith(".safetensors"))
    if not single:
        unknown = sorted({original.name_of(file) for file in original.files} - set(recorded))
        what = "the report has the hash of every weight file of the original"
        problem = f"not of {', '.join(unknown[:3])}" if unknown else None
        same &= findings.judge("original.hash", what, problem)
    if not single:
        there = {original.name_of(x) for x in (*original.decisive, *original.side_files())}
        strange = sorted(there ^ set(recorded))
        what = "the report has the hash of every file of the original that is carried over"
        problem = f"not so for {', '.join(strange[:3])}" if strange else None
        findings.judge("original.hash", what, problem)
    return same


def _check_tensors(written: Written, original: Source, findings: Findings) -> None:
    """Unchanged tensors must equal bit by bit, after the conversion that output.dtype asks for."""
    assert written.report is not None
    if written.source is None:
        reason = "the weight files cannot be opened"
        findings.not_checked("original.tensors", "unchanged tensors", reason)
        return
    report, source = written.report, written.source
    kept = {entry["name"]: entry["bytes"] for entry in report["skipped"]}
    original = _unwrapped(original, {*source.tensors, *report.get("fused", {})})
    original = original.without_copies(
        _checked_copies(report.get("copies", {}), original, findings)
    )
    original = original.apart(fused_of(written.report, original))
    unread_storages = {
        written.keys[row["name"]].weight: row["storage"]
        for row in written.unread
        if row["name"] in written.keys
    }
    for key, info in original.tensors.items():
        factor = Keys(key).key(UP)
        if factor in source.tensors and factor not in original.tensors:
            continue
        what = f"tensor {key} is the original's"
        if key in unread_storages:
            findings.not_checked("original.tensors", what, unread(unread_storages[key]))
        elif key not in source.tensors:
            findings.judge("original.tensors", what, "it is missing")
        elif not _may_change(written, key):  # else C1 measures the bias with its layer
            wanted = original.read(key)
            findings.judge("original.tensors", what, _tensor_problem(written, wanted, key))
        if key in kept:
            stated, what = kept[key], f"the report has the bytes of the original's {key}"
            findings.equal("original.bytes", what, stated, info.num_bytes)
    what = "the report has the bytes and the parameters of the original"
    size = report["size"]
    stated_sizes = [size["checkpoint_bytes"]["before"], size["parameters"]["before"]]
    infos: list[TensorInfo] = list(original.tensors.values())
    found = [sum(i.num_bytes for i in infos), sum(i.num_elements for i in infos)]
    findings.equal("original.bytes", what, stated_sizes, found)


def _unwrapped(original: Source, there: Collection[str]) -> Source:
    """Returns the original under the names of the output, in which no wrapper's parts are.

    Args:
        there: the names of the output's tensors, and of the fused tensors that it took apart.
    """

    def places(keys: Iterable[str]) -> dict[str, str]:
        return {key: key for key in keys if key in there or Keys(key).key(UP) in there}

    shapes = {key: info.shape for key, info in original.tensors.items()}
    return original.renamed(unwrapped_names(shapes, places))


def _checked_copies(copies: dict[str, str], original: Source, findings: Findings) -> dict[str, str]:
    """Checks the copies that the report states and the original has, and returns the true ones.

    The output leaves out a copy: a tensor with the numbers of another tensor.
    """
    found = {key: of for key, of in copies.items() if {key, of} <= original.tensors.keys()}
    for key, of in found.items():
        what = f"the original's {key} is a copy of {of}"
        same = torch.equal(original.read(key), original.read(of))
        findings.judge("original.tensors", what, None if same else "they differ")
    return found


def _may_change(written: Written, key: str) -> bool:
    """Returns whether a tensor may differ from the original's: a bias, or a norm that was trained.

    A bias is one of a factorised layer whose method or whose training may change it.
    """
    if key in norms_of(written):
        return True
    rows = _rows_of_bias(written, key)
    if written.config is None or not rows:
        return False
    own_bias = any(x["method"] == "relu" or x["method"] not in KNOWN for x in rows)
    trained = any(row.get("trained") is True for row in rows)
    return written.config.compression.center or own_bias or trained


def norms_of(written: Written) -> Sequence[str]:
    """Returns the norms' tensors that the report says were trained."""
    recovery = (written.report or {}).get("recovery") or {}
    return recovery.get("norms") or ()


def is_trained(written: Written) -> bool:
    """Returns whether the report says that factors were trained, and biases with them."""
    return any(row.get("trained") is True for row in written.layers)


def check_norms(module: nn.Module, written: Written, original: Source, findings: Findings) -> None:
    """The report must name all norms of the original if they were trained, and nothing else.

    Where windows were trained, only norms that lie in a window that gained are named.

    The function must see the module as it was built, before `make_network`.
    """
    asked = written.config is not None and written.config.recover.norms and is_trained(written)
    norms = norms_by_key(module, original.tensors) if asked else {}
    wanted = sorted(key for key, name in norms.items() if _lies_in_a_window(written, name))
    what = "the tensors of norms that were trained are the original's norms"
    findings.equal("original.norms", what, sorted(norms_of(written)), wanted)


def _lies_in_a_window(written: Written, name: str) -> bool:
    """Returns whether a parameter was trained, as it lies in what was trained at a time."""
    windows = ((written.report or {}).get("recovery") or {}).get("windows")
    if windows is None:
        return True
    gained = [block for x in windows if x["after"] < x["before"] for block in x["blocks"]]
    return any(f"{name}.".startswith(f"{block}.") for block in gained)


def _rows_of_bias(written: Written, key: str) -> list[dict[str, Any]]:
    """Returns the report's rows of the factorised layers that a bias may belong to.

    transformers may give a layer another name than the files do. Such a bias lies beside factors
    that no row of the report is known for; it may belong to any row whose tensors are unknown.
    """
    rows = [(row, written.keys.get(row["name"])) for row in written.factorised]
    own = [row for row, keys in rows if keys is not None and keys.bias == key]
    there = written.source.tensors if written.source else {}
    is_beside_factors = any(Keys(x).bias == key and Keys(x).key(UP) in there for x in there)
    if own or not is_beside_factors:
        return own
    return [row for row, keys in rows if keys is None]


def _tensor_problem(written: Written, original: torch.Tensor, key: str) -> str | None:
    assert written.source is not None
    found = written.source.read(key)
    name = written.config.output.dtype if written.config else "auto"
    if original.is_floating_point() and name in DTYPES:
        original = original.to(DTYPES[name])
    if found.dtype != original.dtype or found.shape != original.shape:
        return f"{found.dtype} {tuple(found.shape)}, not {original.dtype} {tuple(original.shape)}"
    same = torch.equal(_bits(found), _bits(original))
    return None if same else "its numbers differ"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor's bytes, in which every NaN equals itself and -0 is not 0."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _check_side_files(
    written: Written, original: Source, recorded: dict[str, str], findings: Findings
) -> None:
    """Tokenizer, licence and the rest must be carried over; config.json may have additions."""
    if original.path.is_file():
        return
    weights = {original.name_of(file) for file in original.decisive}
    what = "the report names what of the original was left out"
    stated = dict(written.report["provenance"]["left_out"]) if written.report else {}
    findings.equal("original.files", what, stated, dict(original.left_out))
    for name in sorted(original.name_of(file) for file in original.side_files()):
        file, what = written.directory / name, f"the original's {name} is in the output"
        same = file.is_file() and sha256_of(file) == sha256_of(original.path / name)
        findings.judge("original.files", what, None if same else "it is missing, or differs")
    for name, sha256 in recorded.items():
        if name in weights or not is_inside(name):
            continue
        file, what = written.directory / name, f"{name} is carried over unchanged"
        problem = None if file.is_file() and sha256_of(file) == sha256 else "it differs"
        findings.judge("original.files", what, problem)
    if original.config is None:
        return
    ours = read_json(written.directory / "config.json")
    ours.pop("quantization_config", None)
    theirs = {key: value for key, value in original.config.items() if key != NAMED}
    name = written.config.output.dtype if written.config else "auto"
    if name != "auto":
        theirs.pop("torch_dtype", None)
        theirs["dtype"] = name
    problem = None if ours == theirs else "it differs beyond what lrc adds"
    findings.judge("original.files", "config.json is the original's", problem)


def check_all_layers(
    module: nn.Module, written: Written, original: Source, findings: Findings
) -> None:
    """The report must have every layer and every other tensor of the original, with its reason.

    The function must see the module as it was built, before `make_network`. Which layers a network
    uses as products with their weight is not tried out again: their reasons are of a closed set.
    """
    report, config = written.report, written.config
    assert report is not None and config is not None
    layers, skipped = find_layers(module, original, config.compression)
    stated = [(row["name"], row["kind"], row["tied_to"]) for row in written.layers]
    wanted = [(x.name, x.kind, x.tied_to) for x in layers]
    reasons = {entry["name"]: entry["reason"] for entry in report["skipped"]}
    unused = [x for x in layers if is_of_use(reasons.get(x.keys.weight))]
    names = {x.name for x in unused}
    what = "the report has the original's layers, in their order"
    problem = _first_difference(stated, [entry for entry in wanted if entry[0] not in names])
    findings.judge("original.layers", what, problem)
    listed = [(entry["name"], entry["reason"]) for entry in report["skipped"]]
    others = [(x.name, x.reason) for x in skipped]
    others += [(x.keys.weight, reasons[x.keys.weight]) for x in unused]
    what = "the report has the original's other tensors, in their order, with the reasons"
    findings.judge("original.layers", what, _first_difference(listed, others))
    what = "the report says how the original's tensors are tied and taken apart"
    copies, fused = report["copies"], report["fused"]
    apart = {key: entry.to_json() for key, entry in original.fused.items()}
    findings.equal(
        "original.layers", what, [dict(copies), dict(fused)], [dict(original.copies), apart]
    )


def _first_difference(stated: list[Any], found: list[Any]) -> str | None:
    if stated == found:
        return None
    pairs = zip(stated, found, strict=False)
    place = next((pair for pair in pairs if pair[0] != pair[1]), None)
    if place is None:
        return f"{len(stated)} are stated, {len(found)} found"
    return f"stated {place[0]!r}, found {place[1]!r}"


def open_layers(
    module: nn.Module, written: Written, original: Source, findings: Findings
) -> list[Layer]:
    """Returns the report's layers as modules of the dense network, in the report's order.

    The function must see the module as it was built, before `make_network`.
    """
    stored = stored_names(module, original.tensors)
    parts: dict[str, Any] = dict(module.named_modules())
    layers = []
    for row in written.layers:
        name, what = row["name"], f"{row['name']} is a layer of the original of that kind and shape"
        part = parts.get(name)
        key = stored.get(id(getattr(part, "weight", None)))
        shape = None if part is None else linear_shape(part)
        layout = None if part is None else layout_of(part)
        stated = [row["kind"], tuple(row["shape"])]
        if shape is None or layout is None or key is None or stated != [type(part).__name__, shape]:
            findings.judge("original.layers", what, f"found {type(part).__name__} {shape}")
            continue
        findings.judge("original.layers", what, None)
        keys = Keys(key, stored.get(id(getattr(part, "bias", None))))
        layers.append(
            Layer(
                name=name,
                keys=keys,
                kind=row["kind"],
                shape=shape,
                layout=layout,
                dtype=original.tensors[key].dtype,
                unit="",
            )
        )
        size = original.tensors[key].num_bytes
        what = f"the report has the bytes of the original's {name}"
        findings.equal("original.bytes", what, row["bytes_before"], size)
    return layers


def open_networks(
    written: Written,
    original: Source,
    *,
    factory: str | None,
    trust_remote_code: bool,
    findings: Findings,
) -> tuple[Opened, nn.Module | None]:
    """Returns the original, opened, and the output's module.

    The module of a damaged output is None, with a failed statement.

    Raises:
        InputError: the original cannot be loaded.
    """
    dense = open_module(original, factory=factory, trust_remote_code=trust_remote_code)
    what = "the output loads as the network that the original is"
    if written.source is None:
        findings.not_checked("network", what, "the weight files cannot be opened")
        return dense, None
    with findings.guard("network", what):
        module, _ = open_module(
            written.source, factory=factory, trust_remote_code=trust_remote_code
        )
        same = type(module).__qualname__ == type(dense.module).__qualname__
        problem = None if same else f"it is a {type(module).__name__}"
        return dense, module if findings.judge("network", what, problem) else None
    return dense, None


def check_factory(written: Written, factory: str | None, findings: Findings) -> None:
    """The file that defines the factory must have the recorded hash."""
    assert written.report is not None
    recorded = written.report["provenance"]["data_files_sha256"]
    named = written.config.model.factory if written.config else None
    if named is None:
        return
    what = f"the file that defines the factory {named} has the hash in the report"
    if factory != named:
        findings.not_checked("original.factory", what, f"--factory is {factory}")
        return
    try:
        file = source_file(factory)
    except InputError as error:
        findings.not_checked("original.factory", what, str(error))
        return
    found = sha256_of(file) if file else "built in"
    findings.equal("original.factory", what, recorded.get(named), found)
