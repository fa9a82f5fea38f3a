"""The factors of all layers are trained together (`recover.scope: model`)."""

import math

from lrc_cli.engine.training import RATES, USUAL_TRIALS, Training
from lrc_cli.execution.chain import find_chain
from lrc_cli.execution.divergence import OBJECTIVES
from lrc_cli.execution.losses import choose_loss
from lrc_cli.job.factors.two_networks import TwoNetworks
from lrc_cli.job.recover.model import OutputDivergence, step_tokens
from lrc_cli.job.recover.scope import (
    JUDGEMENTS,
    Scope,
    Start,
    Tokens,
    load_training,
    run_training,
    steps_asked,
)
from lrc_cli.job.recover.trainees import install, keys_of, trainees_of
from lrc_cli.job.stage import Advance
from lrc_cli.job.work import Tensors
from lrc_cli.network.layer import Layer
from lrc_cli.report.record import Recovery


class WholeNetwork(Scope):
    """The training of all layers at once, for the outputs of the network."""

    def __init__(self, start: Start) -> None:
        self.start, self.tokens = start, Tokens()
        plan, sequences = start.plan, start.sequences
        batch = next(sequences.batches(1))
        chain = find_chain(plan.network, batch)
        networks = TwoNetworks(plan, chain, [])
        install(networks, start)
        trainees = trainees_of(networks, plan.layers, start)
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
        load_training(self.training, start)

    @property
    def cost(self) -> float:
        """See Scope."""
        training, objective = self.training, self.objective
        steps = training.num_steps - training.step + USUAL_TRIALS * training.trial_steps
        return steps * step_tokens(objective.trained) + JUDGEMENTS * objective.kept_out.num_tokens

    def train(self, advance: Advance) -> Recovery:
        """See Scope."""
        self.tokens.advance = advance
        run_training(self.training, self.start)
        return _summary(self.training, self.objective)

    def trained(self, layer: Layer) -> Tensors:
        """See Scope."""
        best = self.training.best if self.training.gained else {}
        return {key: best[key].cpu() for key in keys_of(layer) if key in best}


def _summary(training: Training, objective: OutputDivergence) -> Recovery:
    trials = {f"{RATES[place]:.2g}": value for place, value in sorted(training.trials.items())}
    return Recovery(
        scope="model",
        objective=OBJECTIVES[objective.loss.kind],
        before=training.start,
        after=training.lowest,
        rate=training.rate if training.step else None,
        trials={rate: value if math.isfinite(value) else None for rate, value in trials.items()},
        steps=training.step,
        planned_steps=training.num_steps,
        tokens=round(training.step * step_tokens(objective.trained)),
        num_sequences=len(objective.trained),
        num_held_out=len(objective.kept_out),
    )
