"""A small report is made by hand here, and pages have a strict reader."""

import math
from html.parser import HTMLParser
from typing import Any

import yaml

from lrc_cli.quality import sentences
from lrc_cli.quality.certificate import NOT_ASKED, make_certificate
from lrc_cli.quality.certificate_record import Certificate, CertificateData, Statement
from lrc_cli.report import card, html
from lrc_cli.report.record import parse_record

VOID = {"meta"}


def render_card(report: dict[str, Any]) -> str:
    """Returns README.md of a report.json."""
    return card.render_card(parse_record(report))


def render_html(report: dict[str, Any]) -> str:
    """Returns report.html of a report.json."""
    return html.render_html(parse_record(report))


def statement_text(statement: dict[str, Any], certificate: dict[str, Any]) -> str:
    """Returns the sentence of a statement of a report.json."""
    told = Statement.from_json(statement, "a statement")
    return sentences.statement_text(told, Certificate.from_json(certificate, "a certificate"))


def assumptions(certificate: dict[str, Any]) -> list[str]:
    """Returns what the statements of a report.json rest on."""
    return list(sentences.assumptions(Certificate.from_json(certificate, "a certificate")))


def factorised_layer(name: str, *, rank: int = 8, stored: float = 0.25) -> dict[str, Any]:
    """Returns a layer stored as an interpolative decomposition."""
    return {
        "name": name,
        "kind": "Linear",
        "shape": [64, 48],
        "method": "curvature",
        "storage": "interpolative",
        "rank": rank,
        "block": 8,
        "reason": "interpolative: two factors do not fit these bytes",
        "fallback": False,
        "bytes_before": 6144,
        "bytes_after": 1696,
        "dtype": "bfloat16",
        "max_coefficient": 3.5,
        "errors": {
            "metric": {
                "unit": "estimated loss increase, nats per token",
                "stored": 0.0123,
                "optimum": 0.0121,
                "svd": 0.0456,
                "total": 0.5,
                "floor": 2.0**-24 * 0.5,
            },
            "output": {
                "inputs": "calibration",
                "stored": stored,
                "optimum": 0.2345,
                "svd": 0.3456,
                "floor": 2.0**-12,
            },
        },
    }


def dense_layer(name: str, *, fallback: bool = False, reason: str = "dense pays better") -> Any:
    """Returns a layer without factors."""
    return {
        "name": name,
        "kind": "Linear",
        "shape": [64, 48],
        "method": "curvature",
        "storage": "dense",
        "reason": reason,
        "fallback": fallback,
        "bytes_before": 6144,
        "bytes_after": 6144,
        "dtype": "bfloat16",
    }


def text_row(name: str) -> dict[str, Any]:
    """Returns the quality of a language model on one text: perplexity 20.4 -> 25.5."""
    return {
        "text": name,
        "num_sequences": 64,
        "num_scored": 32704,
        "scored": "negative log-likelihood of the next token",
        "loss_before": math.log(20.4),
        "loss_after": math.log(25.5),
        "perplexity_before": 20.4,
        "perplexity_after": 25.5,
        "kl": 0.2187,
        "top1_agreement": 0.8125,
        "population": 2821,
        "sha256": "4f4c" * 16,
    }


def small_report() -> dict[str, Any]:
    """Returns a report of four layers, two texts and three skipped tensors."""
    config = {"model": {"path": "models/small", "factory": None, "trust_remote_code": False}}
    return {
        # The job and its target.
        "schema_version": 1,
        "model": "small",
        "architecture": "LlamaForCausalLM",
        "method": "curvature",
        "loss": {
            "description": "negative log-likelihood of the next token",
            "kind": "next_token",
            "unit": "nats per token",
        },
        "target": {"name": "size", "value": 0.8, "of": "compressible", "met": True},
        "allocation": "global",
        "sequential": {"used": False, "reason": "not in this version", "held_back": 0},
        # The outcome: sizes, quality, layers and the tensors that are kept.
        "size": {
            "compressible_bytes": {"before": 24576, "after": 19584},
            "checkpoint_bytes": {"before": 1234567, "after": 1229575},
            "parameters": {"before": 617283, "after": 614755},
            "kept_compressible": 0.797,
            "kept_checkpoint": 0.996,
            "kept_parameters": 0.9959,
            "file_bytes": 1230001,
        },
        "quality": [text_row("wikipedia"), text_row("news")],
        "layers": [
            factorised_layer("model.layers.0.q_proj"),
            factorised_layer("model.layers.1.q_proj", stored=0.2512),
            dense_layer("model.layers.0.v_proj"),
            factorised_layer("model.head"),
        ],
        "skipped": [
            {"name": "model.embed.weight", "reason": "Embedding", "bytes": 900, "share": 0.5},
            {"name": "model.norm.weight", "reason": "a vector", "bytes": 128, "share": 1e-5},
            {"name": "model.norm2.weight", "reason": "a vector", "bytes": 128, "share": 1e-5},
        ],
        # What is certified, what it took, and where it comes from.
        "certificate": {"statements": [], "note": NOT_ASKED},
        "timing": {"checks": 7.888, "statistics": 371.0, "factors": 0.294},
        "memory": {"host_resident": 1534705664},
        "provenance": {
            "lrc_version": "0.1.0",
            "code_sha256": "0" * 64,
            "python": "3.11.7",
            "packages": {"torch": "2.13.0+cpu"},
            "platform": "x86_64",
            "device": "cpu",
            "device_name": None,
            "activation_dtype": "float32",
            "seed": 0,
            "config_sha256": "4272" * 16,
            "config": yaml.safe_dump(config),
            "evaluation": None,
            "checkpoint_sha256": {"model.safetensors": "5303" * 16},
            "data_files_sha256": {"data/text.txt": "5d78" * 16},
            "sequences": {
                "calibration": {
                    "num_sequences": 8,
                    "num_tokens": 512,
                    "population": 6584,
                    "sha256": "711e" * 16,
                }
            },
        },
    }


def certify(report: dict[str, Any], *, per_layer: bool = False, file: str = "text.txt") -> None:
    """Gives a report a certificate, with held-out errors, on made-up values of 120 sequences.

    Args:
        per_layer: at a quantile for which they suffice for statements on single layers too.
        file: the name of the data file.
    """
    ramp = [i / 120 for i in range(120)]
    layers = [layer for layer in report["layers"] if layer["storage"] != "dense"]
    for layer in layers:
        layer["errors"]["held_out"] = {
            "deployed": 0.3456,
            "inherited": 0.1357,
            "new": 0.2468,
            "same_input": 0.2345,
            "worst_sequence": 0.4567,
            "tolerance": 0.3333,
            "num_sequences": 120,
        }
    certificate = make_certificate(
        {"kl": ramp, "top1_disagreement": ramp},
        {layer["name"]: ramp for layer in layers},
        clips={"kl": 0.9},
        tolerances={layer["name"]: 0.3333 for layer in layers},
        confidence=0.95,
        quantile=0.9 if per_layer else 0.96,
        data=CertificateData.from_json(certificate_data(file), "a test"),
    )
    report["certificate"] = certificate.to_json()


def certificate_data(file: str) -> dict[str, Any]:
    """Returns what a certificate says of the draw from a file."""
    return {
        "sequence_length": 64,
        "unit": "sequence of 64 tokens",
        "sampling": "uniformly at random without replacement",
        "population": {
            "description": f"the 6,584 blocks of {file} that calibration left free",
            "file": file,
            "part": [0.0, 1.0],
            "size": 6584,
            "file_sha256": "5d78" * 16,
        },
        "data_sha256": "922e" * 16,
        "selection": {
            "purpose": "calibration",
            "num_sequences": 8,
            "num_tokens": 512,
            "sha256": "711e" * 16,
        },
        "predictions": "next-token predictions",
        "activation_dtype": "float32",
        "not_covered": [],
    }


class Page(HTMLParser):
    """Parses a page: fails on unbalanced tags, keeps elements, texts and references."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def marked(self, tag: str, kind: str) -> int:
        """Returns how many elements have a class."""
        return sum(
            name == tag and kind in (attributes.get("class") or "").split()
            for name, attributes in self.elements
        )
