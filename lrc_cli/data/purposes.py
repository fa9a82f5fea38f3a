"""A config's sections say which sequences are drawn: the purposes, in order."""

from pathlib import Path
from typing import Any

from lrc_cli.config import Calibration, Certification, Config, Recover
from lrc_cli.data.draw import Purpose

CALIBRATION, CERTIFICATION = "calibration", "certification"
HELD_BACK = "held back"
RECOVER = "recover"
MOST_TRAINED = 1024
"""The sequences that are drawn from `recover.path` where the config gives no number."""


def purposes_of(config: Config) -> list[Purpose]:
    """The sequences that the config asks for, in the order in which purposes take them."""
    calibration = config.calibration
    purposes = [_purpose(CALIBRATION, calibration, calibration)]
    if config.certification is not None:
        purposes.append(_purpose(CERTIFICATION, config.certification, calibration))
    if config.evaluation is None:
        held_back = Purpose(
            name=HELD_BACK,
            path=Path(calibration.path),
            sequence_length=calibration.sequence_length,
            num_sequences=64,
            required=False,
            text_field=calibration.text_field,
            chat_template=calibration.chat_template,
        )
        purposes.append(held_back)
    purposes += [_purpose(text.name, text, calibration) for text in config.evaluation or ()]
    # Training takes what is left, so training on more data changes no other draw.
    if config.recover.is_used and config.recover.has_own_data:
        purposes.append(_training(config.recover, calibration))
    return purposes


def _training(recover: Recover, calibration: Calibration) -> Purpose:
    return Purpose(
        name=RECOVER,
        path=Path(recover.path or calibration.path),
        part=recover.part or (None if recover.path else calibration.part) or (0.0, 1.0),
        sequence_length=calibration.sequence_length,
        num_sequences=recover.num_sequences or MOST_TRAINED,
        required=recover.num_sequences is not None,
        text_field=calibration.text_field,
        chat_template=calibration.chat_template,
    )


def _purpose(name: str, section: Any, calibration: Calibration) -> Purpose:
    # Certification data is read in the same way as calibration data.
    read_as = calibration if isinstance(section, Certification) else section
    return Purpose(
        name=name,
        path=Path(section.path or calibration.path),
        part=section.part or (0.0, 1.0),
        sequence_length=section.sequence_length or calibration.sequence_length,
        num_sequences=section.num_sequences,
        required=not section.num_sequences_is_default,
        text_field=read_as.text_field,
        chat_template=read_as.chat_template,
        own_draw=name == CERTIFICATION,
    )
