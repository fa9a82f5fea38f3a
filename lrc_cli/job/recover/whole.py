"""The factors of all layers are trained together (`recover.scope: model`)."""

import math
import time
from collections.abc import Iterable

from lrc_cli.engine.training import RATES, Training
from lrc_cli.execution.chain import find_chain
from lrc_cli.execution.divergence import OBJECTIVES
from lrc_cli.execution.losses import choose_loss
from lrc_cli.job.factors.two_networks import TwoNetworks
from lrc_cli.job.recover.model import OutputDivergence, step_tokens
from lrc_cli.job.recover.scope import (
    Scope,
    Start,
    Tokens,
    cost_of,
    drawn_for,
    load_training,
    run_training,
    steps_asked,
)
from lrc_cli.job.recover.trainees import install, keys_of, norm_trainees, trainees_of
from lrc_cli.job.stage import Advance
from lrc_cli.job.work import Tensors
from lrc_cli.network.layer import Layer
from lrc_cli.report.record import Recovery


class WholeNetwork(Scope):
    """The training of all layers at once, for the outputs of the network."""

    def __init__(self, start: Start) -> None:
        self.start, self.tokens, began = start, Tokens(), time.monotonic()
        plan, sequences = start.plan, start.sequences
        batch = next(sequences.batches(1))
        chain = find_chain(plan.network, batch)
        networks = TwoNetworks(plan, chain, [])
        install(networks, start)
        self.norms = norm_trainees(networks, plan)
        own = trainees_of(networks, plan.layers, start)
        trainees = [*own, *(x for norms in self.norms.values() for x in norms)]
        self.objective = OutputDivergence(
            plan.network,
            networks.compressed.network,
            chain,
            sequences,
            loss=choose_loss(plan.config.compression.loss, plan.network, batch, plan.tokenizer),
            seed=plan.config.runtime.seed,
            processes=plan.processes,
            advance=self.tokens.add,
        )
        num_steps = steps_asked(plan, self.objective.trained)
        self.training = Training(self.objective, trainees, num_steps=num_steps)
        load_training(self.training, start, began)

    @property
    def cost(self) -> float:
        """See Scope."""
        return cost_of(self.training, self.objective.trained, self.objective.kept_out)

    def train(self, advance: Advance) -> Recovery:
        """See Scope."""
        self.tokens.advance, tokens = advance, step_tokens(self.objective.trained)
        run_training(self.training, self.start, lambda steps: advance(steps * tokens))
        return self._summary()

    def trained(self, layer: Layer) -> Tensors:
        """See Scope."""
        return self._best(keys_of(layer))

    def others(self, unit: str) -> Tensors:
        """See Scope."""
        return self._best([x.name for x in self.norms.get(unit, [])])

    def _best(self, keys: Iterable[str]) -> Tensors:
        best = self.training.best if self.training.gained else {}
        return {key: best[key].cpu() for key in keys if key in best}

    def _summary(self) -> Recovery:
        training, objective = self.training, self.objective
        trials = {f"{RATES[place]:.2g}": x for place, x in sorted(training.trials.items())}
        trained, held_out = len(objective.trained), len(objective.kept_out)
        tokens = step_tokens(objective.trained)
        norms = tuple(x.name for own in self.norms.values() for x in own)
        return Recovery(
            scope="model",
            objective=OBJECTIVES[objective.loss.kind],
            before=training.start,
            after=training.lowest,
            rate=training.rate if training.step else None,
            trials={rate: x if math.isfinite(x) else None for rate, x in trials.items()},
            steps=training.step,
            planned_steps=training.num_steps,
            tokens=round(training.step * tokens),
            planned_tokens=round(training.num_steps * tokens),
            num_sequences=trained,
            num_held_out=held_out,
            num_left_out=len(drawn_for(self.start.plan)) - trained - held_out,
            norms=norms if norms and training.gained else None,
        )
