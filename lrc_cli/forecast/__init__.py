"""`lrc plan`: what a job will take, measured on a little of it, and what its sizes will cost."""

from lrc_cli.forecast.command import forecast
from lrc_cli.forecast.render import render

__all__ = ["forecast", "render"]
