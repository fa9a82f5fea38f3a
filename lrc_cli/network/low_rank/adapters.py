"""PEFT is told of factorised layers when a compressed model is loaded, where PEFT is installed."""

from functools import cache
from importlib.util import find_spec


@cache
def register_lora() -> None:
    """Lets PEFT's LoRA take factorised layers by their names, unless PEFT cannot be imported."""
    if find_spec("peft") is None:
        return
    try:
        from lrc_cli.network.low_rank.lora import register
    except Exception:  # another package's import may raise anything; then nobody can use it here
        return
    register()
