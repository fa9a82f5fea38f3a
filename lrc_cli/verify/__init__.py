"""`lrc verify` checks a written directory independently of the run that wrote it.

It imports nothing of the engine, the plan or the run, so that their mistakes are not its own.
"""

from lrc_cli.verify.levels import verify_directory
from lrc_cli.verify.statements import Findings, render

__all__ = ["Findings", "render", "verify_directory"]
