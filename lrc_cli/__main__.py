"""`python -m lrc_cli` is `lrc`."""

import os
import sys


def main() -> None:
    """Run `lrc`; a Ctrl-C while its first modules are imported is a sentence too."""
    try:
        from lrc_cli.cli import main as run
    except KeyboardInterrupt:
        os.write(2, b"interrupted; the same command goes on where it stopped\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
