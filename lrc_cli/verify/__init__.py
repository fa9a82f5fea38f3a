"""`lrc verify`: an independent check of a written directory.

It imports nothing of the engine, the plan or the run: what it says does not rest on what they say.
"""

from lrc_cli.verify.levels import verify_directory
from lrc_cli.verify.statements import Findings, render

__all__ = ["Findings", "render", "verify_directory"]
