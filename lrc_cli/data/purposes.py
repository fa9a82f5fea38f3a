"""A config's sections say which sequences are drawn: the purposes, in order."""

from pathlib import Path
from typing import Any

from lrc_cli.config import Calibration, Certification, Config
from lrc_cli.data.draw import Purpose

CALIBRATION, CERTIFICATION = "calibration", "certification"
HELD_BACK = "held back"


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
        return [*purposes, held_back]
    return [*purposes, *(_purpose(text.name, text, calibration) for text in config.evaluation)]


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
