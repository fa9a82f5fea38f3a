"""report.json and everything that people see, which derives from it alone."""

from lrc_cli.report.build import build_report
from lrc_cli.report.card import render_card
from lrc_cli.report.html import render_html

__all__ = ["build_report", "render_card", "render_html"]
