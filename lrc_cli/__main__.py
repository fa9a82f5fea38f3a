"""`python -m lrc_cli` is `lrc`."""

from lrc_cli.cli import main

main()
