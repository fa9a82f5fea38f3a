"""The main job: two phases over a work directory, because a global budget needs every layer's
spectrum before any rank is known."""

from functools import partial
from typing import Any

import torch

from lrc_cli.checkpoint.writer import begin, discard, publish
from lrc_cli.config import Config
from lrc_cli.engine import SameInput, SolveError
from lrc_cli.fit import Fitted, Request, fit_layer, left_dense
from lrc_cli.gather import collect_statistics, read_statistics
from lrc_cli.models import Layer
from lrc_cli.output import finish_output, write_checkpoint
from lrc_cli.parallel import in_parallel
from lrc_cli.plan import Plan, make_plan
from lrc_cli.progress import Progress
from lrc_cli.purposes import CERTIFICATION, purposes_of
from lrc_cli.ranks import allocate_ranks, check_reachable, rank_multiple
from lrc_cli.work import OUTPUT_SPECTRA, SPECTRA, STATISTICS, WorkDirectory

PARALLEL_WIDTH = 2048
"""Layers up to this width are solved side by side on a CPU, wider ones in turn."""


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
        check_reachable(plan)
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
    _say_what_failed(report, progress)
    return report


def _say_what_failed(report: dict[str, Any], progress: Progress) -> None:
    if not report["target"]["met"]:
        name, value = report["target"]["name"], report["target"]["value"]
        progress.note(f"compression.{name}: {value} is missed: see the layers that fell back")
    if all(layer["storage"] == "dense" for layer in report["layers"]):
        progress.note("no layer was factorised: see the reasons in the report")


def _say_what_is_off(plan: Plan, progress: Progress) -> None:
    """A setting that resolves to nothing is never ignored in silence."""
    if plan.config.compression.sequential == "auto":
        progress.note("compression.sequential: auto is off: not in this version")
    compression = plan.config.compression
    if compression.loss != "auto" and all("fisher" not in s.needs for s in plan.solvers.values()):
        progress.note(f"compression.loss: {compression.loss} is not used: no layer has curvature")
    for purpose in purposes_of(plan.config):
        found = len(plan.sequences.get(purpose.name, ()))
        if found < purpose.num_sequences:
            lowered = f"{found} sequences, not {purpose.num_sequences}, because no more are left"
            progress.note(f"{purpose.name}: {lowered if found else 'skipped, no sequence is left'}")
    if CERTIFICATION in plan.sequences:
        held = len(plan.sequences[CERTIFICATION])
        progress.note(f"certification: {held} blocks held back; this version certifies nothing yet")


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
            solve = partial(_spectrum, plan, work, stage)
            solved = list(in_parallel(solve, layers, _num_workers(plan, layers)))
            named = list(zip(layers, solved, strict=True))
            tensors = {layer.name: s for layer, (s, _) in named if s is not None}
            reasons = {layer.name: reason for layer, (s, reason) in named if s is None}
            work.put(stage, unit, tensors, {"dense": reasons})
            phase.advance(sum(map(_eigen_cost, layers)))


def _spectrum(
    plan: Plan, work: WorkDirectory, stage: str, layer: Layer
) -> tuple[torch.Tensor | None, str]:
    """A layer's spectrum; None, with the reason, where it must stay dense."""
    solver = plan.solvers[layer.name]
    if stage == OUTPUT_SPECTRA and solver.output_spectrum is solver.spectrum:
        spectra, facts = work.get(SPECTRA, layer.unit)
        return spectra.get(layer.name), facts["dense"].get(layer.name, "")
    statistics, reason = read_statistics(plan, work, layer)
    if statistics is None:
        return None, reason
    solve = solver.spectrum if stage == SPECTRA else solver.output_spectrum
    try:
        return solve(_weight(plan, layer), statistics), ""
    except SolveError as error:
        return None, f"could not be solved: {error}"


def _num_workers(plan: Plan, layers: list[Layer]) -> int:
    """How many layers to solve at once: wide ones use all cores, and much memory, on their own."""
    widest = max(max(layer.shape) for layer in layers)
    if plan.device.type != "cpu" or widest > PARALLEL_WIDTH:
        return 1
    return torch.get_num_threads()


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
            fit = partial(_fit, plan, work, ranks)
            solved = list(in_parallel(fit, layers, _num_workers(plan, layers)))
            tensors: dict[str, torch.Tensor] = {}
            for layer, fitted in zip(layers, solved, strict=True):
                tensors |= fitted.tensors(layer.key)
            facts = {x.name: fitted.facts for x, fitted in zip(layers, solved, strict=True)}
            work.put(stage, unit, tensors, facts)
            phase.advance(sum(map(_eigen_cost, layers)))


def _fit(plan: Plan, work: WorkDirectory, ranks: dict[str, int], layer: Layer) -> Fitted:
    spectra, facts = work.get(SPECTRA, layer.unit)
    reasons = dict(facts["dense"])
    if plan.config.compression.max_layer_error is not None:
        reasons |= work.get(OUTPUT_SPECTRA, layer.unit)[1]["dense"]
    if layer.name in reasons:
        return left_dense(reasons[layer.name], fallback=True)
    statistics, _ = read_statistics(plan, work, layer)
    assert statistics is not None
    problem = SameInput(
        _weight(plan, layer),
        statistics,
        plan.solvers[layer.name],
        spectra[layer.name].to(plan.device),
    )
    return fit_layer(problem, _request(plan, layer, ranks[layer.name]))


def _request(plan: Plan, layer: Layer, rank: int) -> Request:
    compression = plan.config.compression
    override = compression.override(layer.name)
    return Request(
        rank=rank,
        rank_multiple=rank_multiple(plan, layer),
        storage=override.storage or compression.storage,
        dtype=plan.stored_dtype(layer),
        max_layer_error=None if override.rank is not None else compression.max_layer_error,
        bias=layer.bias(plan.source),
    )
