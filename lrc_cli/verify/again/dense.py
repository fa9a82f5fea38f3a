"""Why layers stay dense is looked at once more: whether inputs and gradients reach them."""

import torch
from torch import Tensor

from lrc_cli.data.padding import Masks
from lrc_cli.data.purposes import CALIBRATION
from lrc_cli.execution.hooks import hooked
from lrc_cli.execution.losses import Loss, drawing
from lrc_cli.network.layer import Layer
from lrc_cli.verify.again.moments import STATISTICS_TOKENS, batch_size, real_rows, run_batch
from lrc_cli.verify.again.networks import OpenedRun
from lrc_cli.verify.files.reasons import UNGRADED, UNREACHED
from lrc_cli.verify.methods import KNOWN


def check_dense(run: OpenedRun, loss: Loss | None) -> None:
    """A dense layer fell back if and only if no input or no gradient reaches it.

    A layer that could not be solved is not looked at: that is the run's own claim.
    """
    rows = {row["name"]: row for row in run.written.layers}
    layers = [x for x in run.dense if rows[x.name]["method"] in KNOWN - {"svd"}]
    if not layers:
        return
    what = "the layers that no calibration input reaches are the ones that fell back"
    if CALIBRATION not in run.sequences:
        run.findings.not_checked("c1.dense", what, "the calibration data is not there")
        return
    graded = {x.name for x in layers if rows[x.name]["method"] == "curvature"}
    reached, moved = _reached(run, layers, graded if loss is not None else set(), loss)
    for layer in layers:
        reason, name = rows[layer.name]["reason"], layer.name
        found = None if name in reached else UNREACHED
        if found is None and name in graded and loss is not None and name not in moved:
            found = UNGRADED
        stated = reason if reason in (UNREACHED, UNGRADED) else None
        what = f"{name} stays dense because nothing reaches it, or for another reason"
        run.findings.equal("c1.dense", what, stated, found)


def _reached(
    run: OpenedRun, layers: list[Layer], graded: set[str], loss: Loss | None
) -> tuple[set[str], set[str]]:
    """Returns the layers that calibration inputs reach, and the layers that gradients reach.

    The pass ends as soon as both have reached all layers.
    """
    reached: set[str] = set()
    moved: set[str] = set()
    masks: Masks = ()

    def begin(given: Masks) -> None:
        nonlocal masks
        masks = given

    def after_layer(layer: Layer, x: Tensor, y: Tensor) -> Tensor | None:
        if len(real_rows(x.detach(), masks)):
            reached.add(layer.name)
        if layer.name not in graded:
            return None
        if not y.requires_grad:
            y = y.requires_grad_().clone()

        def look(gradient: Tensor) -> None:
            if bool(torch.any(real_rows(gradient, masks))):
                moved.add(layer.name)

        y.register_hook(look)
        return y

    sequences, chain = run.sequences[CALIBRATION], run.chain
    masking = torch.Generator().manual_seed(run.seed)
    wanted = {layer.name for layer in layers}
    with hooked(run.before, layers, after_layer):
        for index, batch in enumerate(sequences.batches(batch_size(sequences, STATISTICS_TOKENS))):
            run_batch(run.before, chain, batch, loss, masking, drawing(run.seed, index), begin)
            if reached == wanted and moved == graded:
                break
    return reached, moved
