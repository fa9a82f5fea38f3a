"""The record of a job, report.json, is put into the words and charts that people read."""

from lrc_cli.report.card import render_card
from lrc_cli.report.html import render_html

__all__ = ["render_card", "render_html"]
