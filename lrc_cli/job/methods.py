"""The methods of a config are checked against what it asks; every layer gets its solver here."""

from collections.abc import Callable, Mapping, Sequence

from lrc_cli.config import Compression
from lrc_cli.data.draw import Batch
from lrc_cli.engine import SOLVERS, Solver
from lrc_cli.errors import InputError
from lrc_cli.execution.followed_by import followed_by
from lrc_cli.execution.network import Network
from lrc_cli.network.layer import Layer


def methods_that(can: Callable[[Solver], bool]) -> list[str]:
    """Returns the names of the solvers that can do something, in the order of SOLVERS."""
    return [solver.name for solver in SOLVERS.values() if can(solver)]


def check_methods(compression: Compression, solvers: Mapping[str, Solver]) -> None:
    """Raises InputError where a method cannot do what is asked.

    Args:
        solvers: the solvers that the config names, by layer name.
    """
    if compression.max_loss_increase is not None:
        _check_all(solvers, "max_loss_increase", lambda solver: solver.predicts_loss)
    if compression.threshold is not None:
        _check_all(solvers, "threshold", lambda solver: solver.rank_above is not None)
    if compression.center:
        remedy = f"set center: false, or {_use_another()}"
        _check_none(solvers, "center", lambda solver: solver.no_center, remedy)
    if compression.max_layer_error is not None:
        _check_none(solvers, "max_layer_error", lambda s: s.no_layer_error, _use_another())
    methods = {solver.name for solver in solvers.values()}
    if len(methods) > 1 and compression.allocation == "global":
        raise InputError(
            "compression.allocation: global compares errors in one unit, and"
            f" {' and '.join(sorted(methods))} have different ones",
            "set allocation: relative or uniform",
        )


def _check_all(solvers: Mapping[str, Solver], target: str, can: Callable[[Solver], bool]) -> None:
    """Raises InputError where a layer has a solver that cannot do what the target needs."""
    other = next((name for name, solver in solvers.items() if not can(solver)), None)
    if other is not None:
        raise InputError(
            f"compression.{target}: needs method {' or '.join(methods_that(can))}, and {other} has"
            f" {solvers[other].name}",
            "leave its method out, or exclude the layer",
        )


def _check_none(
    solvers: Mapping[str, Solver], key: str, why_not: Callable[[Solver], str | None], remedy: str
) -> None:
    """Raises InputError where a solver of any layer has a reason against the key."""
    used = [solver for solver in SOLVERS.values() if solver in solvers.values()]
    reason = next(filter(None, map(why_not, used)), None)
    if reason is not None:
        raise InputError(f"compression.{key}: {reason}", remedy)


def _use_another() -> str:
    """Returns the remedy that names the methods which serve every layer and every setting."""
    return f"use {' or '.join(methods_that(_is_general))}"


def _is_general(solver: Solver) -> bool:
    refuses = solver.no_center or solver.no_layer_error or solver.followed_by
    return solver.is_sequential and not refuses


def with_stand_ins(
    asked: Mapping[str, Solver], network: Network, layers: Sequence[Layer], batch: Batch
) -> tuple[dict[str, Solver], dict[str, str]]:
    """Replaces each solver that needs an activation after its layer where there is none.

    Args:
        asked: the solvers that the config names, by layer name.
        batch: a micro-batch, on which the network is watched.

    Returns:
        The solvers by layer name, and the reasons of the layers whose solver was replaced.

    Raises:
        InputError: no layer of such a method is followed by its activation.
    """
    solvers, reasons = dict(asked), dict[str, str]()
    for solver in dict.fromkeys(asked.values()):
        if solver.followed_by is None:
            continue
        own = [layer for layer in layers if asked[layer.name] is solver]
        followed = followed_by(solver.followed_by, network, own, batch)
        if not followed:
            raise InputError(
                f"compression.method: {solver.name}: no selected layer is followed by a"
                f" {solver.followed_by}",
                _use_another(),
            )
        assert solver.stand_in is not None
        for name in {layer.name for layer in own} - followed:
            solvers[name] = solver.stand_in
            reasons[name] = (
                f"not followed by {solver.followed_by}: fitted with {solver.stand_in.name}"
            )
    return solvers, reasons
