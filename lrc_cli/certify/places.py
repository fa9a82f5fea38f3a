"""The places of `lrc certify` are checked against one another before any work."""

from pathlib import Path

from lrc_cli.checkpoint.output_directory import check_names_beside, names_beside, resolve_output
from lrc_cli.config.certify import CertifyConfig
from lrc_cli.errors import InputError
from lrc_cli.report.junit import check_junit_path
from lrc_cli.runtime.places import (
    Place,
    check_apart,
    check_name,
    check_plain,
    place_to_read,
    place_to_write,
)

OUTPUT, JUNIT = "output.path", "--junit"


def check_places(config: CertifyConfig, config_file: Path | None, junit: Path | None) -> Path:
    """Checks what will be written against what is read, and touches none of it.

    Args:
        config_file: the file that the config was read from; None: no file.
        junit: the JUnit file to write; None: none is written.

    Returns:
        The absolute path of the directory to write.

    Raises:
        InputError: a place lies in another place, or something that lrc did not make has the name.
    """
    paths = {
        "the original": Path(config.original.path),
        "the copy": Path(config.other.path),
        "the data": Path(config.data.path),
    }
    for name, path in paths.items():
        check_name(name, path)
    places = [place_to_read(name, path) for name, path in paths.items()]
    read = [place for place in places if place is not None]
    output = resolve_output(config.output.path)
    for path in (output, *names_beside(output)):
        check_apart(Place(name=OUTPUT, path=path), read)
    check_names_beside(output)
    if config_file is not None:
        read += [x for x in [place_to_read("the config", config_file)] if x is not None]
    if junit is not None:
        _check_junit(junit, output, read)
    return output


def _check_junit(junit: Path, output: Path, read: list[Place]) -> None:
    check_plain(JUNIT, junit)
    file = place_to_write(JUNIT, junit)
    # The manifest names every file of the certificate: a JUnit file would make it false.
    if file.path.is_relative_to(output):
        raise InputError(f"{JUNIT}: {file.path} lies in the certificate", "give another path")
    check_apart(file, read)
    check_junit_path(junit)
