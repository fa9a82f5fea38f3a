"""The main job: two phases over a work directory, because a global budget needs every layer's
spectrum before any rank is known."""

from functools import partial
from typing import Any

import torch

from lrc_cli.checkpoint.writer import begin, discard, publish
from lrc_cli.config import Config
from lrc_cli.engine import SolveError, Statistics
from lrc_cli.fit import Fitted, Request, fit_layer, left_dense
from lrc_cli.losses import choose_loss
from lrc_cli.models import Layer, input_groups
from lrc_cli.output import finish_output, write_checkpoint
from lrc_cli.parallel import in_parallel
from lrc_cli.plan import CALIBRATION, CERTIFICATION, Plan, make_plan
from lrc_cli.progress import Progress
from lrc_cli.ranks import allocate_ranks, rank_multiple
from lrc_cli.statistics import collect
from lrc_cli.work import (
    OUTPUT_SPECTRA,
    SPECTRA,
    STATISTICS,
    WorkDirectory,
    compress_gram,
    expand_gram,
)

MICRO_BATCH_TOKENS = 2048


def compress(
    config: Config, *, force: bool = False, restart: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """Compress the checkpoint that the config names and write the output directory.

    Returns:
        The report, as in report.json.

    Raises:
        InputError: the config or the data cannot be used; nothing was written.
        RunError: the run failed; finished units stay in the work directory.
    """
    progress = progress or Progress()
    with progress.phase("checks", 1):
        plan = make_plan(config, force=force)
    _say_what_is_off(plan, progress)
    with WorkDirectory(plan.work_dir, plan.statistics_fingerprint) as work:
        factors = f"factors/{plan.factors_fingerprint}"
        if restart:
            work.drop([STATISTICS, SPECTRA, OUTPUT_SPECTRA, factors])
        collect_statistics(plan, work, progress)
        solve_spectra(plan, work, progress)
        ranks = allocate_ranks(plan, read_spectra(plan, work))
        factorize_layers(plan, work, ranks, factors, progress)
        begin(plan.output)
        try:
            write_checkpoint(plan, work, factors, progress)
            report = finish_output(plan, work, factors, progress)
            publish(plan.output, force=force)
        except BaseException:
            discard(plan.output)
            raise
    return report


def _say_what_is_off(plan: Plan, progress: Progress) -> None:
    """A setting that resolves to nothing is never ignored in silence."""
    if plan.config.compression.sequential == "auto":
        progress.note("compression.sequential: auto is off: not in this version")
    if CERTIFICATION in plan.sequences:
        held = len(plan.sequences[CERTIFICATION])
        progress.note(f"certification: {held} blocks held back; this version certifies nothing yet")


def collect_statistics(plan: Plan, work: WorkDirectory, progress: Progress) -> None:
    """Phase one, data: Gram matrices of every unit that has none yet, in one pass."""
    missing = [unit for unit in plan.units if not work.has(STATISTICS, unit)]
    if not missing:
        return
    layers = [layer for unit in missing for layer in plan.units[unit]]
    needing = {
        need: [layer for layer in layers if need in plan.solvers[layer.name].needs]
        for need in ("gram", "fisher")
    }
    if not needing["gram"]:
        for unit in missing:
            work.put(STATISTICS, unit, {}, {"layers": {}, "loss": None})
        return
    network = plan.network
    sequences = plan.sequences[CALIBRATION]
    probe = next(sequences.batches(1))
    loss = None
    if needing["fisher"]:
        loss = choose_loss(plan.config.compression.loss, network, probe, plan.tokenizer)
        progress.note(f"loss: {loss.description}")
    leaders = input_groups(network, needing["gram"], probe)
    groups: dict[str, list[Layer]] = {}
    for layer in needing["gram"]:
        if layer.name in leaders:
            groups.setdefault(leaders[layer.name], []).append(layer)
    with progress.phase("statistics", len(sequences)) as phase:
        grams, fishers = collect(
            network,
            sequences,
            inputs=groups,
            outputs=needing["fisher"],
            loss=loss,
            seed=plan.config.runtime.seed,
            micro_batch=max(1, MICRO_BATCH_TOKENS * len(sequences) // sequences.num_tokens),
            advance=phase.advance,
        )
    for unit in missing:
        tensors: dict[str, torch.Tensor] = {}
        facts: dict[str, Any] = {}
        for layer in plan.units[unit]:
            group = leaders.get(layer.name)
            facts[layer.name] = {
                "group": group,
                "group_unit": next((x.unit for x in groups.get(group or "", [])[:1]), None),
                "tokens": grams[group].num_rows if group in grams else 0,
                "has_gradient": layer.name in fishers,
            }
            for kind, sums in (("gram", grams), ("fisher", fishers)):
                if layer.name in sums:
                    pair = compress_gram(sums[layer.name].mean())
                    tensors[f"{kind}.{layer.name}"], tensors[f"{kind}-scale.{layer.name}"] = pair
        described = None if loss is None else {"kind": loss.kind, "description": loss.description}
        work.put(
            STATISTICS,
            unit,
            tensors,
            {"layers": facts, "loss": described, "activations": str(network.dtype)},
        )


def read_statistics(plan: Plan, work: WorkDirectory, layer: Layer) -> tuple[Statistics | None, str]:
    """A layer's statistics on the run's device; None, with the reason, where it must stay dense."""
    needs = plan.solvers[layer.name].needs
    if not needs:
        return Statistics(), ""
    tensors, facts = work.get(STATISTICS, layer.unit)
    seen = facts["layers"][layer.name]
    if not seen["tokens"]:
        return None, "no calibration input reached it"
    if "fisher" in needs and not seen["has_gradient"]:
        return None, "the loss does not depend on it"

    def expand(kind: str, name: str, stored: dict[str, torch.Tensor]) -> torch.Tensor:
        return expand_gram(stored[f"{kind}.{name}"], stored[f"{kind}-scale.{name}"], plan.device)

    leader = (
        tensors if seen["group_unit"] == layer.unit else work.get(STATISTICS, seen["group_unit"])[0]
    )
    fisher = expand("fisher", layer.name, tensors) if "fisher" in needs else None
    return Statistics(gram=expand("gram", seen["group"], leader), fisher=fisher), ""


def solve_spectra(plan: Plan, work: WorkDirectory, progress: Progress) -> None:
    """Phase one, eigenvalues: the error of every layer at every rank."""
    stages = [SPECTRA]
    if plan.config.compression.max_layer_error is not None:
        stages.append(OUTPUT_SPECTRA)
    todo = [(stage, unit) for stage in stages for unit in plan.units if not work.has(stage, unit)]
    if not todo:
        return
    cost = sum(_eigen_cost(layer) for _, unit in todo for layer in plan.units[unit])
    with progress.phase("spectra", cost) as phase:
        for stage, unit in todo:
            layers = plan.units[unit]
            tensors, reasons = {}, {}
            solved = in_parallel(partial(_spectrum, plan, work, stage), layers, plan.device)
            for layer, (spectrum, reason) in zip(layers, solved, strict=True):
                if spectrum is None:
                    reasons[layer.name] = reason
                else:
                    tensors[layer.name] = spectrum
                phase.advance(_eigen_cost(layer))
            work.put(stage, unit, tensors, {"dense": reasons})


def _spectrum(
    plan: Plan, work: WorkDirectory, stage: str, layer: Layer
) -> tuple[torch.Tensor | None, str]:
    """A layer's spectrum; None, with the reason, where it must stay dense."""
    statistics, reason = read_statistics(plan, work, layer)
    if statistics is None:
        return None, reason
    solver = plan.solvers[layer.name]
    solve = solver.spectrum if stage == SPECTRA else solver.output_spectrum
    try:
        return solve(_weight(plan, layer), statistics), ""
    except SolveError as error:
        return None, f"could not be solved: {error}"


def _weight(plan: Plan, layer: Layer) -> torch.Tensor:
    return layer.weight(plan.source).to(plan.device)


def _eigen_cost(layer: Layer) -> float:
    # An eigenproblem on the small side, and products with the large one.
    small, large = sorted(layer.shape)
    return float(small**3 * 4 + small * large * (small + large))


def read_spectra(plan: Plan, work: WorkDirectory) -> dict[str, torch.Tensor]:
    """By layer name, the spectra of what the target bounds."""
    bounds_output = plan.config.compression.max_layer_error is not None
    stage = OUTPUT_SPECTRA if bounds_output else SPECTRA
    return {name: s for unit in plan.units for name, s in work.get(stage, unit)[0].items()}


def factorize_layers(
    plan: Plan, work: WorkDirectory, ranks: dict[str, int], stage: str, progress: Progress
) -> None:
    """Phase two: the factors of every unit that has none yet."""
    todo = [unit for unit in plan.units if not work.has(stage, unit)]
    if not todo:
        return
    cost = sum(_eigen_cost(layer) for unit in todo for layer in plan.units[unit])
    with progress.phase("factors", cost) as phase:
        for unit in todo:
            layers = plan.units[unit]
            tensors: dict[str, torch.Tensor] = {}
            outcome: dict[str, Any] = {}
            solved = in_parallel(partial(_fit, plan, work, ranks), layers, plan.device)
            for layer, fitted in zip(layers, solved, strict=True):
                outcome[layer.name] = fitted.facts
                if fitted.packed is not None:
                    tensors[f"{layer.key}.weight"] = fitted.packed.weight
                    tensors[f"{layer.key}.up.weight"] = fitted.packed.up
                    if fitted.packed.perm is not None:
                        tensors[f"{layer.key}.perm"] = fitted.packed.perm
                phase.advance(_eigen_cost(layer))
            work.put(stage, unit, tensors, outcome)


def _fit(plan: Plan, work: WorkDirectory, ranks: dict[str, int], layer: Layer) -> Fitted:
    spectra, facts = work.get(SPECTRA, layer.unit)
    reason = facts["dense"].get(layer.name)
    if reason is not None:
        return left_dense(reason, fallback=True)
    statistics, _ = read_statistics(plan, work, layer)
    assert statistics is not None
    return fit_layer(
        _weight(plan, layer),
        plan.solvers[layer.name],
        statistics,
        spectra[layer.name].to(plan.device),
        _request(plan, layer, ranks[layer.name]),
    )


def _request(plan: Plan, layer: Layer, rank: int) -> Request:
    compression = plan.config.compression
    override = compression.override(layer.name)
    return Request(
        rank=rank,
        rank_multiple=rank_multiple(plan, layer),
        storage=override.storage or compression.storage,
        dtype=plan.stored_dtype(layer),
        max_layer_error=compression.max_layer_error,
    )
