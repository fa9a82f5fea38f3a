"""Quality over kept share, of published methods, ours, and ours with trained factors, in one run.

    .venv/bin/python scripts/fetch_demo.py --tests --tasks
    .venv/bin/python scripts/bench_quality.py --curve --estimate          how long it will take
    .venv/bin/python scripts/bench_quality.py --curve                     all of it
    .venv/bin/python scripts/bench_quality.py --curve --models smollm2 --shares 0.6 --methods ours
    .venv/bin/python scripts/bench_quality.py --curve --draw              tables and picture again

Every row is `lrc compress` with a config of configs/, and its written files are scored. A finished
row is a line of --results, and a run leaves out the rows that are there, so a run that was stopped
goes on. Rows with the same statistics share them through the work directory. The script ends with
the tables and docs/curve.svg.

A method is BASE[/SWITCH ...][+TRAINING], such as ours/factors+recover:

    svd      plain SVD, equal shares for all layers, two factors
    svd-llm  `frobenius`, equal shares, two factors, inputs of the dense network: SVD-LLM's method
    aa-svd   the same, fitted to the compressed network's inputs without holding data back:
             AA-SVD's closed form
    ours     the config as it is

    /factors /interpolative   the form of storage      /sequential /plain   fitted to the inputs of
    /sampled /output          compression.loss                              the compressed or dense
                                                                            network
    +recover  factors are trained together (scope: model)       +block  window by window

svd-llm+recover stands in for SVD-LLM's second stage. SVD-LLM's own code adapts one factor after
the other by LoRA of rank 8 to its training text; the stand-in trains both factors whole, on the
outputs of the dense network, and so can do more.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp
from pathlib import Path

import torch
from curve_results import DENSE, Results, Row, Subject, grouped, picture, table
from tasks.common import ROOT, UNIFORM, Missing, Setting, needed
from torch import nn

from lrc_cli import compress
from lrc_cli.config import Config, load_config
from lrc_cli.errors import LrcError
from lrc_cli.execution.network import make_network
from lrc_cli.forecast import forecast
from lrc_cli.job.plan import make_plan
from lrc_cli.runtime.progress import Progress
from lrc_cli.text import duration

OUT = ROOT / "out" / "curve"
FIGURE = ROOT / "docs" / "curve.svg"
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
BASES = {
    "svd": ("compression.method=svd", *UNIFORM, "compression.sequential=false"),
    "svd-llm": ("compression.method=frobenius", *UNIFORM, "compression.sequential=false"),
    "aa-svd": (
        "compression.method=frobenius",
        *UNIFORM,
        "compression.sequential=true",
        "compression.correction=1",
    ),
    "ours": (),
}
SWITCHES = {
    "factors": "compression.storage=factors",
    "interpolative": "compression.storage=interpolative",
    "sequential": "compression.sequential=true",
    "plain": "compression.sequential=false",
    "sampled": "compression.loss=sampled",
    "output": "compression.loss=output",
}
TRAININGS = {"recover": "recover.scope=model", "block": "recover.scope=block"}
METHODS = (
    *("svd", "svd-llm", "svd-llm+recover", "aa-svd"),
    *("ours", "ours+block", "ours+recover"),
)
LABELS = {
    "svd": "plain SVD",
    "svd-llm": "SVD-LLM",
    "svd-llm+recover": "SVD-LLM, then our recover",
    "aa-svd": "AA-SVD's closed form",
    "ours": "lrc",
    "ours+block": "lrc, recover: block",
    "ours+recover": "lrc, recover: model",
}
RECORDING = 512
"""The training tokens that a recording stands for."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the curve.

    Attributes:
        subject: what its tables say.
        shares: the kept shares that are measured where none are named.
        prepare: the setting, given an empty folder and how many sequences of each text are scored.
        training: the config's keys of `recover`, given a folder and the number of tokens.
        scored: how many sequences of each text are scored; 0: all that there is.
    """

    subject: Subject
    shares: tuple[float, ...]
    prepare: Callable[[Path, int, int], Setting]
    training: Callable[[Path, int], list[str]]
    scored: Callable[[int], int] = lambda _: 0


def prepare_decoder(folder: Path, seed: int, num_sequences: int) -> Setting:
    """SmolLM2, scored on sequences of both texts that the seed draws."""
    base = ROOT / "configs" / "benchmark.yaml"
    model = needed(ROOT / ".cache" / "models" / "smollm2-135m")
    seeds = [f"calibration.seed={seed}", f"runtime.seed={seed}", f"output.path={folder / 'none'}"]
    scored = [f"evaluation.{i}.num_sequences={num_sequences}" for i in (0, 1)]
    plan = make_plan(load_config(base, [*seeds, *scored]))

    def score(module: nn.Module) -> dict[str, float]:
        from bench_quality import score

        network = make_network(module, device=torch.device("cpu"), dtype=None)
        losses = score({"it": network}, plan)["it"]
        return {text: exp(loss) for text, loss in losses.items()}

    return Setting(config="benchmark.yaml", overrides=(), score=score, model=model, dtype=None)


def prepare_encoder(folder: Path, seed: int, num_sequences: int) -> Setting:
    """MiniLM on pairs of sentences; see scripts/tasks/encoder.py."""
    from tasks import encoder

    return encoder.prepare(folder)


def prepare_speech(folder: Path, seed: int, num_sequences: int) -> Setting:
    """whisper-tiny.en on spoken sentences; see scripts/tasks/speech.py."""
    from tasks import speech

    return speech.prepare(folder)[0]


def on_text(path: Callable[[Path], Path], part: str, folder: Path, tokens: int) -> list[str]:
    """Training on all that calibration leaves of its text."""
    text = [f"recover.path={path(folder)}", f"recover.part={part}"]
    return [*text, f"recover.tokens={tokens}"]


def on_recordings(folder: Path, tokens: int) -> list[str]:
    """Training on the recordings of the calibration data, which are counted, not their tokens."""
    return [f"recover.tokens={max(1, tokens // RECORDING)}"]


MODELS = {
    "smollm2": Model(
        subject=Subject(
            title="SmolLM2-135M",
            figures={"wikipedia": "perplexity on Wikipedia", "news": "perplexity on news"},
            relative=True,
            targets={
                ("ours+recover", share, text): wanted
                for share, pair in ((0.8, (1.08, 1.15)), (0.6, (1.5, 2.0)), (0.4, (3.0, 5.0)))
                for text, wanted in zip(("wikipedia", "news"), pair, strict=True)
            },
        ),
        shares=SHARES,
        prepare=prepare_decoder,
        training=partial(on_text, lambda _: ROOT / ".cache" / "data" / "wikipedia.txt", "[0, 0.7]"),
        scored=lambda number: number,
    ),
    "minilm": Model(
        subject=Subject(
            title="MiniLM",
            figures={
                "Wikipedia, embedding error": "error of embeddings, Wikipedia",
                "news, embedding error": "error of embeddings, news",
            },
            relative=False,
            targets={
                ("ours+recover", 0.6, "Wikipedia, embedding error"): 0.22,
                ("ours+recover", 0.6, "news, embedding error"): 0.32,
            },
        ),
        shares=(0.6, 0.4),
        prepare=prepare_encoder,
        training=partial(on_text, lambda folder: folder / "calibration.txt", "null"),
    ),
    "whisper": Model(
        subject=Subject(
            title="whisper-tiny.en",
            figures={"word error rate": "word error rate"},
            relative=False,
            targets={},
        ),
        shares=(0.6, 0.4),
        prepare=prepare_speech,
        training=on_recordings,
    ),
}


def main(given: Sequence[str]) -> int:
    """Run what is missing, print the tables and write the picture; 0 where nothing failed."""
    arguments = parsed(given)
    results = Results(arguments.results)
    try:
        if arguments.estimate:
            return estimate(arguments)
        failed = 0 if arguments.draw else sum(measure(arguments, results))
    except (LrcError, Missing) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    show(arguments, results)
    return 1 if failed else 0


def parsed(given: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command line, without --curve."""
    parser = argparse.ArgumentParser(
        prog="bench_quality.py --curve",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    add("--shares", type=float, nargs="+", help="kept shares, in place of each model's own")
    add("--methods", type=method, nargs="+", default=list(METHODS), metavar="METHOD")
    add("--tokens", type=int, default=1 << 19, help="training tokens (524288)")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--blocks", type=int, default=64, help="sequences of each text that SmolLM2 is scored on")
    add("--results", type=Path, default=OUT / "results.jsonl", help="file of finished rows")
    add("--figure", type=Path, default=FIGURE, help="where to write the picture")
    add("--draw", action="store_true", help="measure nothing")
    add("--estimate", action="store_true", help="print what `lrc plan` says of the missing time")
    add("--keep", action="store_true", help="keep the written checkpoints")
    return parser.parse_args(given)


def method(name: str) -> str:
    """A method's name. Raises ArgumentTypeError for an unknown one."""
    base, *switches = name.partition("+")[0].split("/")
    training = name.partition("+")[2]
    for part, known in ((base, BASES), *((switch, SWITCHES) for switch in switches)):
        if part not in known:
            raise argparse.ArgumentTypeError(f"{part!r} in {name!r} is none of {', '.join(known)}")
    if training not in ("", *TRAININGS):
        known = ", ".join(TRAININGS)
        raise argparse.ArgumentTypeError(f"{training!r} in {name!r} is none of {known}")
    return name


def settings_of(name: str, training: Callable[[], list[str]]) -> list[str]:
    """The settings of a method, beside the config.

    Args:
        training: the keys of `recover`, for a method that trains.
    """
    fitted, _, trained = name.partition("+")
    base, *switches = fitted.split("/")
    own = [TRAININGS[trained], *training()] if trained else []
    return [*BASES[base], *(SWITCHES[switch] for switch in switches), *own]


@dataclass(frozen=True, kw_only=True)
class Job:
    """The rows of one model and one seed."""

    name: str
    seed: int
    arguments: argparse.Namespace

    @property
    def model(self) -> Model:
        """The model's entry."""
        return MODELS[self.name]

    @property
    def folder(self) -> Path:
        """Where data and outputs lie. Outputs side by side share their work directory."""
        return OUT / self.name / f"seed{self.seed}"

    @property
    def shares(self) -> Sequence[float]:
        """The kept shares to measure."""
        return self.arguments.shares or self.model.shares

    @property
    def scored(self) -> int:
        """How many sequences of each text are scored."""
        return self.model.scored(self.arguments.blocks)

    def key(self, method: str, share: float) -> tuple[str, int, str, float, int, int]:
        """The key of a row; see `Row`."""
        tokens = self.arguments.tokens if "+" in method else 0
        return self.name, self.seed, method, share, tokens, self.scored

    def missing(self, results: Results) -> list[tuple[str, float]]:
        """Methods and shares without a row. What needs no training comes first."""
        methods = sorted(self.arguments.methods, key=lambda name: "+" in name)
        pairs = [(name, share) for name in methods for share in self.shares]
        return [pair for pair in pairs if self.key(*pair) not in results.rows]

    def config(self, setting: Setting, method: str, share: float) -> Config:
        """The config of a row."""
        training = partial(self.model.training, self.folder, self.arguments.tokens)
        path = self.folder / f"{method}-{share:g}".replace("/", "-").replace("+", "-")
        overrides = [
            *setting.settings,
            *settings_of(method, training),
            *(f"calibration.seed={self.seed}", f"runtime.seed={self.seed}"),
            *(f"compression.size={share}", f"output.path={path}", "evaluation=[]"),
        ]
        return load_config(ROOT / "configs" / setting.config, overrides)


def jobs(arguments: argparse.Namespace) -> list[Job]:
    """A job for every model and seed."""
    return [
        Job(name=name, seed=seed, arguments=arguments)
        for name in arguments.models
        for seed in arguments.seeds
    ]


def measure(arguments: argparse.Namespace, results: Results) -> Iterator[bool]:
    """Measures the missing rows. Yields, for every row, whether it failed."""
    for job in jobs(arguments):
        missing = job.missing(results)
        if not missing:
            continue
        job.folder.mkdir(parents=True, exist_ok=True)
        setting = job.model.prepare(job.folder, job.seed, job.scored)
        # The scores of some tasks are distances from the network that is scored first.
        dense = setting.score_written(setting.model)
        results.add(_row(job, DENSE, 1.0, dense, kept=1.0, seconds=0.0, phases={}))
        for number, (name, share) in enumerate(missing):
            left = _expected(job, results, missing[number:])
            print(f"{job.name}, seed {job.seed}: {name} at {share:g}{left}", file=sys.stderr)
            yield not _measure_one(job, setting, name, share, results)


def _measure_one(job: Job, setting: Setting, name: str, share: float, results: Results) -> bool:
    """Measures a row; whether it could be measured. One that cannot is said, and left out."""
    start = time.perf_counter()
    try:
        config = job.config(setting, name, share)
        report = compress(config, force=True, progress=Progress())
        seconds = time.perf_counter() - start
        scores = setting.score_written(Path(config.output.path))
    except LrcError as error:
        print(f"left out: {job.name}, {name} at {share:g}: {error}", file=sys.stderr)
        return False
    kept = report["size"]["kept_compressible"]
    phases = report["timing"]
    results.add(_row(job, name, share, scores, kept=kept, seconds=seconds, phases=phases))
    if not job.arguments.keep:
        shutil.rmtree(config.output.path)
    return True


def _row(
    job: Job,
    name: str,
    share: float,
    scores: dict[str, float],
    *,
    kept: float,
    seconds: float,
    phases: dict[str, float],
) -> Row:
    model, seed, _, _, tokens, scored = job.key(name, share)
    return Row(
        model=model,
        seed=seed,
        method=name,
        share=share,
        tokens=tokens,
        scored=scored,
        scores=scores,
        kept=kept,
        seconds=round(seconds, 1),
        phases=phases,
        commit=commit(),
    )


def commit() -> str:
    """The commit of the working tree, with a plus behind it where files differ."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=7", "--dirty=+"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def _expected(job: Job, results: Results, missing: Sequence[tuple[str, float]]) -> str:
    """How long the missing rows will take, if each of their methods has a row already."""
    taken: dict[str, list[float]] = {}
    for row in results.rows.values():
        if row.model == job.name and row.tokens in (0, job.arguments.tokens):
            taken.setdefault(row.method, []).append(row.seconds)
    if any(name not in taken for name, _ in missing):
        return ""
    seconds = sum(min(taken[name]) for name, _ in missing)
    return f" ({len(missing)} rows left, {duration(seconds)} and scoring)"


def estimate(arguments: argparse.Namespace) -> int:
    """Prints the time of the missing rows, by `lrc plan`, scoring apart."""
    results, total = Results(arguments.results), 0.0
    for job in jobs(arguments):
        missing, seen = job.missing(results), set[str]()
        if missing:
            job.folder.mkdir(parents=True, exist_ok=True)
            setting = job.model.prepare(job.folder, job.seed, job.scored)
        for name in dict.fromkeys(name for name, _ in missing):
            shares = [share for other, share in missing if other == name]
            try:
                configs = [job.config(setting, name, share) for share in shares]
                found = forecast(configs, collect=False, progress=Progress(quiet=True))
            except LrcError as error:
                print(f"{job.name}, seed {job.seed}: {name} would be left out: {error}")
                continue
            # Methods with one work directory collect its statistics once.
            shared = ("statistics", "spectra") if found["work_dir"] in seen else ()
            seen.add(found["work_dir"])
            seconds = sum(value for key, value in found["seconds"].items() if key not in shared)
            total += seconds
            each = ", ".join(f"{share:g}" for share in shares)
            print(f"{job.name}, seed {job.seed}: {name} at {each}: {duration(seconds)}", flush=True)
    print(f"together {duration(total)}, without scoring")
    return 0


def show(arguments: argparse.Namespace, results: Results) -> None:
    """Prints the tables of the rows that are there, and writes the picture."""
    subjects = {name: MODELS[name].subject for name in arguments.models}
    rows = [row for row in results.rows.values() if row.seed in arguments.seeds]
    groups = grouped(rows, subjects, arguments.methods, arguments.tokens)
    for group in groups:
        print(f"{table(group, LABELS)}\n", flush=True)
    if groups:
        arguments.figure.write_text(picture(groups, LABELS), encoding="utf-8")
        print(f"{arguments.figure}: written")
