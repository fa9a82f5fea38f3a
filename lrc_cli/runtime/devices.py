"""The key `runtime.device` decides where a run computes; each process gets a GPU of its own."""

import torch

from lrc_cli.errors import InputError
from lrc_cli.runtime.processes import ALONE, Processes


def resolve_device(name: str, processes: Processes = ALONE) -> torch.device:
    """The torch device of `runtime.device`. Each of several processes gets a GPU of its own.

    Raises:
        InputError: the device is absent, or there are too few GPUs for all processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and processes.size > 1:
        return _own_gpu(device, processes)
    if device.type == "mps":
        raise InputError("runtime.device: mps has no float64, which the solvers need", "use cpu")
    available = {"cpu": 1, "cuda": torch.cuda.device_count()}
    if available[device.type] <= (device.index or 0):
        raise InputError(f"runtime.device: {name} is not there", "use auto or cpu")
    return device


def _own_gpu(device: torch.device, processes: Processes) -> torch.device:
    if device.index is not None:
        raise InputError(
            f"runtime.device: {device} is one GPU, and {processes.size} processes need one each",
            "use auto or cuda",
        )
    if processes.local_rank >= torch.cuda.device_count():
        raise InputError(
            f"runtime.device: more processes than GPUs ({torch.cuda.device_count()}) on a machine",
            "start as many as there are GPUs, or set runtime.device: cpu",
        )
    own = torch.device("cuda", processes.local_rank)
    torch.cuda.set_device(own)
    return own
