"""A certificate says here what was drawn, from which population, and what its limits came from."""

from dataclasses import replace

import torch

from lrc_cli.data.draw import Purpose, Sequences
from lrc_cli.data.kinds import member, members
from lrc_cli.execution.losses import Loss
from lrc_cli.quality.certificate_record import CertificateData, Population, Selection
from lrc_cli.text import count

NUM_SELECTION = 16
"""The number of sequences that tolerances and clipping limits are chosen on."""
PREDICTIONS = {
    "next_token": "next-token predictions",
    "masked_token": "predictions of masked tokens",
}


def first_sequences(whole: Sequences, drawn: Sequences) -> Sequences:
    """Returns the first sequences of a draw, with texts as long as in certification.

    Limits are for one certification sequence, and values of longer sequences vary less.

    Args:
        whole: the sequences to choose limits on.
        drawn: the certification sequences.
    """
    inputs = {name: tensor[:NUM_SELECTION] for name, tensor in whole.inputs.items()}
    if set(inputs) == set(drawn.inputs) == {"input_ids"}:
        inputs["input_ids"] = inputs["input_ids"][:, : drawn.inputs["input_ids"].shape[1]]
    return replace(whole, inputs=inputs)


def certificate_data(
    purpose: Purpose,
    drawn: Sequences,
    chosen: Sequences,
    *,
    chosen_sha256: str,
    file_sha256: str,
    loss: Loss,
    dtype: torch.dtype,
    not_covered: tuple[str, ...] = (),
) -> CertificateData:
    """Returns what was drawn, from which population, and which data fixed the limits.

    Args:
        purpose: the purpose that the certification sequences were drawn for.
        drawn: the certification sequences.
        chosen: the sequences that limits were chosen on.
        chosen_sha256: the hash of all that was drawn for their purpose.
        file_sha256: the hash of the data file.
        loss: how outputs are scored.
        dtype: the dtype of activations.
        not_covered: the layers that no statement is about.
    """
    unit = member(purpose.path)
    length = purpose.sequence_length if unit == "block" else None
    return CertificateData(
        sequence_length=length,
        unit=unit if length is None else f"sequence of {length} tokens",
        sampling="uniformly at random without replacement",
        population=Population(
            description=_population(purpose, drawn, chosen.name),
            file=purpose.path.name,
            part=purpose.part,
            size=drawn.population,
            file_sha256=file_sha256,
        ),
        data_sha256=drawn.sha256,
        selection=Selection(
            purpose=chosen.name,
            num_sequences=len(chosen),
            num_tokens=chosen.num_tokens,
            sha256=chosen_sha256,
        ),
        predictions=PREDICTIONS.get(loss.kind, "predictions"),
        activation_dtype=str(dtype).removeprefix("torch."),
        not_covered=not_covered,
    )


def _population(purpose: Purpose, drawn: Sequences, earlier: str) -> str:
    place, (first, last) = purpose.path.name, purpose.part
    if drawn.one_in is not None:
        place = f"one passage in {drawn.one_in} of {place}"
    if (first, last) != (0.0, 1.0):
        place += f" (part {first:g} to {last:g})"
    many = members(purpose.path, purpose.sequence_length)
    return f"the {count(drawn.population)} {many} of {place} that {earlier} left free"
