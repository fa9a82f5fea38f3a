"""Both networks, the data and the layers are opened here, ready to be measured."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from lrc_cli.checkpoint.source import Source
from lrc_cli.data.draw import Sequences
from lrc_cli.data.processors import open_processors
from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.errors import InputError
from lrc_cli.execution.chain import Chain
from lrc_cli.execution.network import Network, make_network
from lrc_cli.execution.precision import DTYPES
from lrc_cli.execution.segments import find_segments
from lrc_cli.network.layer import Layer
from lrc_cli.runtime.devices import resolve_device
from lrc_cli.runtime.progress import Progress
from lrc_cli.verify.again.data import draw_again
from lrc_cli.verify.again.moments import HELD_BYTES, Checked
from lrc_cli.verify.files.forms import is_read, reader_of, unread
from lrc_cli.verify.files.written import Written, layer_tensors
from lrc_cli.verify.original.unchanged import (
    check_all_layers,
    check_norms,
    open_layers,
    open_networks,
)
from lrc_cli.verify.statements import Findings


@dataclass(frozen=True, kw_only=True)
class OpenedRun:
    """A finished run with both networks, the data and the layers, ready to be measured."""

    written: Written
    before: Network
    after: Network
    tokenizer: Any
    sequences: Mapping[str, Sequences]
    checked: list[Checked]
    dense: list[Layer]
    """The layers that stay dense."""
    findings: Findings
    progress: Progress

    @cached_property
    def chain(self) -> Chain:
        """The blocks of the dense network, as the run has cut it for its statistics."""
        graded = {row["name"] for row in self.written.layers if row["method"] == "curvature"}
        layers = [*(checked.layer for checked in self.checked), *self.dense]
        batch = next(self.sequences[CALIBRATION].batches(1))
        return find_segments(self.before, layers, graded, batch).chain

    @property
    def seed(self) -> int:
        """The seed of masked tokens, drawn labels and probes."""
        assert self.written.config is not None
        return self.written.config.runtime.seed

    def row(self, checked: Checked) -> dict[str, Any]:
        """Returns the report's row of a layer."""
        return next(row for row in self.written.layers if row["name"] == checked.layer.name)


def open_run(
    written: Written,
    original: Source,
    data: Path | None,
    factory: str | None,
    trust_remote_code: bool,
    findings: Findings,
    progress: Progress,
) -> OpenedRun | None:
    """Opens all that is measured.

    It returns None, with statements that say why, where the networks do not match.
    """
    assert written.report is not None
    (dense, original), module = open_networks(
        written,
        original,
        factory=factory,
        trust_remote_code=trust_remote_code,
        findings=findings,
    )
    with findings.guard("original.layers", "the report's layers are all that there are"):
        check_all_layers(dense, written, original, findings)
        check_norms(dense, written, original, findings)
    layers = open_layers(dense, written, original, findings)
    processors = open_processors(original, dense, trust_remote_code=trust_remote_code)
    sequences = draw_again(written, processors, data, findings)
    if module is None or len(layers) < len(written.layers):
        return None
    facts = written.report["provenance"]
    dtype, device = DTYPES[facts["activation_dtype"]], _device(facts["device"])
    factorised = {row["name"] for row in written.factorised if is_read(row["storage"])}
    for row in written.unread:
        what = f"the errors of {row['name']} are what they are on the calibration data"
        findings.not_checked("c1", what, unread(row["storage"]))
    size = sum(4 * math.prod(x.shape) for x in layers if x.name in factorised)
    held = size <= HELD_BYTES
    checked = [
        _checked(written, original, layer, device, held)
        for layer in layers
        if layer.name in factorised
    ]
    return OpenedRun(
        written=written,
        before=make_network(dense, device=device, dtype=dtype),
        after=make_network(module, device=device, dtype=dtype),
        tokenizer=processors.tokenizer,
        sequences=sequences,
        checked=checked,
        dense=[
            layer
            for layer, row in zip(layers, written.layers, strict=True)
            if row["storage"] == "dense"
        ],
        findings=findings,
        progress=progress,
    )


def _device(name: str) -> torch.device:
    """Returns the recorded device, or the device that there is here."""
    try:
        return resolve_device(name)
    except (InputError, KeyError, RuntimeError, TypeError):
        return resolve_device("auto")


def _checked(
    written: Written, original: Source, layer: Layer, device: torch.device, held: bool
) -> Checked:
    source = written.source
    assert source is not None
    tensors, key = layer_tensors(source, layer.keys), layer.keys.bias
    bias = layer.bias(original)
    offset = None
    trained = any(row.get("trained") is True for row in written.layers if row["name"] == layer.name)
    # A trained bias is no part of C1, which compares W x with Z x and with the best Z of the rank.
    if key in source.tensors and not trained:
        new = source.read(key).double()
        old = torch.zeros_like(new) if bias is None else bias.double()
        offset = None if torch.equal(old.to(source.read(key).dtype).double(), new) else old - new
    return Checked(
        layer=layer,
        weight=layer.weight(original).to(device),
        fitted=partial(reader_of(tensors).dense, tensors),
        offset=None if offset is None else offset.to(device),
        bias=None if bias is None else bias.to(device),
        held=held,
    )
