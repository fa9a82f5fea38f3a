"""A plan is what a config will do; the checkpoint and the data are opened and checked for it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lrc_cli.checkpoint.output_directory import check_output, resolve_output
from lrc_cli.checkpoint.source import Source, open_source
from lrc_cli.config import Config, matches, to_dict
from lrc_cli.data.draw import Sequences, draw
from lrc_cli.data.processors import open_processors
from lrc_cli.data.purposes import CALIBRATION, CERTIFICATION, RECOVER, purposes_of
from lrc_cli.engine import Solver
from lrc_cli.errors import InputError, RunError
from lrc_cli.execution.constancy import Trace, check_alone
from lrc_cli.execution.input_checks import check_sequences, check_unused, probe
from lrc_cli.execution.network import Network, make_network
from lrc_cli.execution.precision import DTYPES
from lrc_cli.execution.weight_use import reasons_of
from lrc_cli.job.calibration_rows import Reach, with_enough_data
from lrc_cli.job.fingerprints import digest, factors_fingerprint, statistics_fingerprint
from lrc_cli.job.inputs import Inputs, look_at_inputs, states_before
from lrc_cli.job.methods import check_methods, with_stand_ins
from lrc_cli.job.places import check_places, check_work_directory, work_directory
from lrc_cli.job.planned_layer import PlannedLayer, asked_solvers, plan_layers
from lrc_cli.job.work import FACTORS
from lrc_cli.network.candidates.find import Skipped, find_layers
from lrc_cli.network.candidates.new_bias import check_bias
from lrc_cli.network.layer import Layer
from lrc_cli.network.opening import open_module
from lrc_cli.report.gates import check_gates_possible
from lrc_cli.runtime.devices import resolve_device
from lrc_cli.runtime.files import check_writable
from lrc_cli.runtime.processes import ALONE, Processes


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked job, ready to run."""

    config: Config
    source: Source
    network: Network
    """The dense network; on the CPU its parameters are views of the files."""
    trace: Trace
    tokenizer: Any
    layers: list[Layer]
    skipped: list[Skipped]
    planned: Mapping[str, PlannedLayer]
    """What is settled for each layer, by name."""
    sequences: dict[str, Sequences]
    """The sequences for "calibration", "certification" and each evaluation text, by its name."""
    reach: Reach | None
    """The rows that the calibration sequences give the layers; None where no layer needs data."""
    inputs: Inputs
    """The files that the run was started on."""
    data_hashes: Mapping[str, str]
    """The sha256 of every data file or folder and of the factory's code, as they were read."""
    statistics_fingerprint: dict[str, Any]
    factors_fingerprint: str
    work_dir: Path
    output: Path
    """The directory to write."""
    processes: Processes
    """The processes that share the work."""

    def of(self, layer: Layer) -> PlannedLayer:
        """Returns what is planned for one of the layers."""
        return self.planned[layer.name]

    @property
    def solvers(self) -> list[Solver]:
        """The solvers, in the order of `layers`."""
        return [self.of(layer).solver for layer in self.layers]

    @property
    def units(self) -> dict[str, list[Layer]]:
        """Layers by unit, in the network's order."""
        units: dict[str, list[Layer]] = {}
        for layer in self.layers:
            units.setdefault(layer.unit, []).append(layer)
        return units

    @cached_property
    def owners(self) -> dict[str, int]:
        """{unit: rank of the process that sums its statistics, solves its layers and writes it}."""
        costs = {u: sum(x.solve_cost for x in layers) for u, layers in self.units.items()}
        return self.processes.owners(costs)

    def owns(self, unit: str) -> bool:
        """Returns whether the unit belongs to this process."""
        return self.owners[unit] == self.processes.rank

    @property
    def factors_stage(self) -> str:
        """The stage of the work directory that holds the factors."""
        return f"{FACTORS}/{self.factors_fingerprint}"

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return self.network.device

    @property
    def compressible_bytes(self) -> int:
        """Bytes of the layers' dense weights in the source."""
        return sum(layer.num_bytes for layer in self.layers)

    @property
    def evaluation_names(self) -> list[str]:
        """Names of the texts that quality is measured on, in order."""
        others = (CALIBRATION, CERTIFICATION, RECOVER)
        return [name for name in self.sequences if name not in others]


def make_plan(config: Config, *, force: bool = False, processes: Processes = ALONE) -> Plan:
    """Opens the checkpoint and the data and checks all that can be checked before the work begins.

    Raises:
        InputError: the config, the checkpoint or the data cannot be used.
        RunError: another run is writing the output, or the processes do not plan the same.
    """
    # Checks that need no weights come first: they take no time.
    check_gates_possible(config)
    output = resolve_output(config.output.path)
    processes.from_first(lambda: check_places([config]))
    before = states_before(config)
    source = open_source(Path(config.model.path), state_dict=config.model.state_dict)
    processes.from_first(lambda: check_output(output, force=force))
    # The checkpoint becomes a module, and its layers are found.
    source.check_finite()
    module, source = open_module(
        source, factory=config.model.factory, trust_remote_code=config.model.trust_remote_code
    )
    layers, skipped = find_layers(module, source, config.compression)
    check_layers(config, layers)
    if config.compression.center:
        check_bias(module, source, layers)
    # Sequences are drawn for every purpose at once, because no two may share a token.
    processors = open_processors(source, module, trust_remote_code=config.model.trust_remote_code)
    sequences = draw(purposes_of(config), processors=processors, seed=config.calibration.seed)
    if CALIBRATION not in sequences:
        raise InputError(
            "calibration: the data has not one whole sequence in its part",
            "give more data, widen the part, or lower sequence_length",
        )
    check_sequences(sequences, module, source)
    inputs = look_at_inputs(config, source, before)
    # The network runs once, which shows the layers whose weight is not used as W in y = W x + b.
    device = resolve_device(config.runtime.device, processes)
    network = make_network(module, device=device, dtype=DTYPES.get(config.runtime.dtype))
    check_unused(network, sequences, source)
    uses = probe(network, sequences, layers)
    reasons = reasons_of(network, layers, uses)
    skipped += [
        Skipped(name=x.keys.weight, reason=reasons[x.name], num_bytes=x.num_bytes)
        for x in layers
        if x.name in reasons
    ]
    if reasons and len(reasons) == len(layers):
        name, reason = next(iter(reasons.items()))
        raise InputError(
            f"compression: no layer is selected that can be factorised: {name} {reason}",
            "see docs/inputs.md for the layers that can be compressed",
        )
    layers = [layer for layer in layers if layer.name not in reasons]
    check_layers(config, layers)
    trace = replace(uses[0].trace, layers=layers)
    if config.certification is not None:
        check_alone(network, trace, next(sequences[CALIBRATION].batches(2)))
    asked = asked_solvers(config.compression, layers)
    # Wide layers need more sequences than the default, which a config may leave open.
    config, sequences, reach = with_enough_data(config, asked, trace, sequences, processors)
    check_sequences(sequences, module, source)
    # A solver that needs an activation after its layer is replaced where the network has none.
    solvers, stand_in_reasons = with_stand_ins(asked, network, layers, trace.batch)
    # The fingerprints tell which earlier work is used again.
    statistics = statistics_fingerprint(
        config, source, sequences[CALIBRATION], solvers, network, processors.tokenizer
    )
    identity = digest(statistics)
    work_dir = work_directory(config, identity)
    check_writable(work_dir, "runtime.work_dir")
    processes.from_first(lambda: check_work_directory(work_dir))
    # Processes with other files would mix two jobs into one output.
    if len(set(processes.gather(digest([identity, to_dict(config)])))) > 1:
        raise RunError(
            "the processes do not have the same config, checkpoint and data",
            "give all machines the same files",
        )
    return Plan(
        config=config,
        source=source,
        network=network,
        trace=trace,
        tokenizer=processors.tokenizer,
        layers=layers,
        skipped=skipped,
        planned=plan_layers(config, layers, source, solvers, stand_in_reasons),
        sequences=sequences,
        reach=reach,
        inputs=inputs,
        data_hashes=inputs.data_hashes,
        statistics_fingerprint=statistics,
        factors_fingerprint=factors_fingerprint(config, identity),
        work_dir=work_dir,
        output=output,
        processes=processes,
    )


def with_config(plan: Plan, config: Config, *, force: bool = False) -> Plan:
    """Returns the plan of a config that differs in the target and in `output.path` only.

    Raises:
        InputError: a method cannot do what the target needs, or the output cannot be written.
        RunError: another run is writing the output.
    """
    config = replace(config, calibration=plan.config.calibration)
    output = resolve_output(config.output.path)
    plan.processes.from_first(lambda: check_places([config]))
    plan.processes.from_first(lambda: check_output(output, force=force))
    check_layers(config, plan.layers)
    factors = factors_fingerprint(config, digest(plan.statistics_fingerprint))
    return replace(with_target(plan, config), output=output, factors_fingerprint=factors)


def with_target(plan: Plan, config: Config) -> Plan:
    """Returns the plan with the target of another config, which may differ in nothing else."""
    solvers = {name: x.solver for name, x in plan.planned.items()}
    reasons = {name: x.method_reason for name, x in plan.planned.items() if x.method_reason}
    planned = plan_layers(config, plan.layers, plan.source, solvers, reasons)
    return replace(plan, config=config, planned=planned)


def check_layers(config: Config, layers: list[Layer]) -> None:
    """Raises InputError if nothing is left to compress, or a method cannot do what is asked."""
    if not layers:
        raise InputError(
            "compression: no layer is selected",
            "see `lrc inspect`, and check compression.include and exclude",
        )
    compression = config.compression
    check_methods(compression, asked_solvers(compression, layers))
    unused = [p for p in compression.layers if not any(matches(p, layer.name) for layer in layers)]
    if unused:
        raise InputError(
            f"compression.layers: {unused[0]!r} matches no selected layer", "see `lrc inspect`"
        )
