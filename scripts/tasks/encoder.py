"""MiniLM, a sentence encoder: error of its embeddings and retrieval on texts of two kinds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from tasks.common import (
    DATA,
    FROBENIUS,
    MODELS,
    OURS,
    Check,
    Results,
    Scores,
    Setting,
    Task,
    beats,
    compare,
    needed,
    sentences,
    split_articles,
)

SHARE = 0.7
"""The share of Wikipedia's text, whole articles, to calibrate on; the rest is for the test."""
PAIRS = 300
MAX_TOKENS = 256
"""The length to which the model's makers cut texts."""
RATIO = 0.70


def run(folder: Path, size: float) -> Results:
    """Compare the rows at one size."""
    return compare(prepare(folder), folder, size)


def prepare(folder: Path) -> Setting:
    """Calibrated on Wikipedia's first articles, scored on its last ones and on news."""
    model = needed(MODELS / "minilm")
    first, last = split_articles(needed(DATA / "wikipedia.txt").read_text("utf-8"), SHARE)
    calibration = folder / "calibration.txt"
    calibration.write_text("\n\n".join(first) + "\n", encoding="utf-8")
    paragraphs = [line for article in last for line in article.split("\n")]
    news = needed(DATA / "news.txt").read_text("utf-8").splitlines()
    texts = {"Wikipedia": pairs(paragraphs), "news": pairs(news)}
    lee, similarities = read_lee(needed(DATA / "lee"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    dense: dict[str, Tensor] = {}

    def score(module: nn.Module) -> Scores:
        scores: Scores = {}
        for name, (queries, documents) in texts.items():
            found = embed(module, tokenizer, [*queries, *documents])
            wanted = dense.setdefault(name, found)
            error = (found - wanted).norm() / wanted.norm()
            scores[f"{name}, embedding error"] = error.item()
            scores[f"{name}, retrieval"] = retrieval(found)
        scores["Lee-50 correlation"] = correlation(embed(module, tokenizer, lee), similarities)
        return scores

    overrides = [f"calibration.path={calibration}", "calibration.part=null"]
    return Setting(config="encoder.yaml", overrides=overrides, score=score, model=model)


def pairs(paragraphs: Sequence[str]) -> tuple[list[str], list[str]]:
    """Queries and the documents that answer them: first sentences and the rest of paragraphs.

    PAIRS of them, evenly spread over the paragraphs that have three sentences or more.
    """
    cut = [found for text in paragraphs if len(found := sentences(text)) >= 3]
    step = max(len(cut) / PAIRS, 1)
    chosen = [cut[int(i * step)] for i in range(min(PAIRS, len(cut)))]
    return [found[0] for found in chosen], [" ".join(found[1:]) for found in chosen]


@torch.no_grad()
def embed(module: nn.Module, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    """Means of the last hidden states over the real tokens, of length 1: (texts, width)."""
    found: dict[int, Tensor] = {}
    for batch in torch.tensor(sorted(range(len(texts)), key=lambda i: len(texts[i]))).split(16):
        chosen = batch.tolist()
        tokens = tokenizer(
            [texts[i] for i in chosen],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        hidden = module(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        means = functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        found |= dict(zip(chosen, means, strict=True))
    return torch.stack([found[i] for i in range(len(texts))])


def retrieval(embeddings: Tensor) -> float:
    """The share of the queries (first half) whose nearest document (second half) is their own."""
    queries, documents = embeddings.chunk(2)
    nearest = (queries @ documents.T).argmax(dim=1)
    return (nearest == torch.arange(len(queries))).float().mean().item()


def read_lee(folder: Path) -> tuple[list[str], Tensor]:
    """50 texts, and how similar people found each two of them (50, 50)."""
    texts = (folder / "texts.txt").read_text("utf-8").splitlines()
    lines = (folder / "similarities.tsv").read_text("utf-8").splitlines()
    return texts, torch.tensor([[float(x) for x in line.split()] for line in lines])


def correlation(embeddings: Tensor, similarities: Tensor) -> float:
    """Pearson's, of cosines with what people said, over the pairs of different texts."""
    i, j = torch.triu_indices(len(similarities), len(similarities), offset=1)
    cosines = (embeddings @ embeddings.T)[i, j]
    return torch.corrcoef(torch.stack([cosines, similarities[i, j]]))[0, 1].item()


def checks(scores: Mapping[str, Scores]) -> list[Check]:
    """The targets; Lee-50 is printed only: it does not discriminate."""
    found = []
    for name in ("Wikipedia", "news"):
        error, accuracy = f"{name}, embedding error", f"{name}, retrieval"
        ratio = scores[OURS][error] / scores[FROBENIUS][error]
        found.append(Check(f"{error} / frobenius's: {ratio:.3f} <= {RATIO}", ratio <= RATIO))
        ours, other = (scores[row][accuracy] for row in (OURS, FROBENIUS))
        words = f"{accuracy}: {ours:.3f} no lower than frobenius's {other:.3f}"
        found.append(Check(words, ours >= other))
        found += beats(scores, error)
    return found


TASK = Task(title="MiniLM, a sentence encoder", size=0.6, run=run, checks=checks)
