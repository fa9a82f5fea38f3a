"""report.json and everything that people see, which derives from it alone.

What assembles it, `report.build`, is not imported here: `lrc verify` renders reports, and must not
import the run that made them.
"""

from lrc_cli.report.card import render_card
from lrc_cli.report.html import render_html

__all__ = ["render_card", "render_html"]
