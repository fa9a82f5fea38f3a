"""One checkpoint is written in every form that people have."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pico
import process_helpers
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

RANKS = 2


def _emptied(original: Path, directory: Path) -> pico.State:
    """Copies everything but the weights, and returns the weights."""
    shutil.copytree(original, directory, ignore=shutil.ignore_patterns("*.safetensors*"))
    return pico.read_state(original)


def as_bin(original: Path, directory: Path) -> None:
    """Writes pytorch_model.bin."""
    torch.save(_emptied(original, directory), directory / "pytorch_model.bin")


def as_old_bin(original: Path, directory: Path) -> None:
    """Writes pytorch_model.bin as torch wrote it before 1.6."""
    state = _emptied(original, directory)
    file = directory / "pytorch_model.bin"
    torch.save(state, file, _use_new_zipfile_serialization=False)


def as_shards(original: Path, directory: Path) -> None:
    """Writes two .bin files with an index."""
    state = _emptied(original, directory)
    keys, index = list(state), {}
    for number, own in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({key: state[key] for key in own}, directory / name)
        index |= dict.fromkeys(own, name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "pytorch_model.bin.index.json").write_text(text)


def as_training_save(original: Path, directory: Path) -> None:
    """Writes what a training loop saves of a model in DataParallel and torch.compile."""
    state = _emptied(original, directory)
    saved = {
        "epoch": 3,
        "loss": torch.tensor(0.5),
        "model_state_dict": {f"module._orig_mod.{key}": x for key, x in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
    }
    torch.save(saved, directory / "last.ckpt")


def as_distributed(original: Path, directory: Path) -> None:
    """Writes shards of two processes, nested as in the tutorial of torch, with an optimizer."""
    _emptied(original, directory)
    rendezvous = directory.with_name(f"{directory.name}.rendezvous")
    processes = [
        process_helpers.fork(_save_shards, rank, str(original), str(directory), str(rendezvous))
        for rank in range(RANKS)
    ]
    for process in processes:
        process.join(process_helpers.PATIENCE)
        assert process.exitcode == 0


def _save_shards(rank: int, original: str, directory: str, rendezvous: str) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # unused: the file is
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    state = pico.read_state(Path(original))
    sharded = {
        key: distribute_tensor(x, mesh, [Shard(0)]) if x.ndim else x for key, x in state.items()
    }
    moments = {key: {"exp_avg": x, "step": torch.tensor(1.0)} for key, x in sharded.items()}
    saved = {"app": {"model": sharded, "optim": {"state": moments, "lr": 0.1}}, "epoch": 3}
    dcp.save(saved, checkpoint_id=directory)
    dist.destroy_process_group()


FORMS: dict[str, Callable[[Path, Path], None]] = {
    "bin": as_bin,
    "old bin": as_old_bin,
    "shards": as_shards,
    "training save": as_training_save,
    "distributed": as_distributed,
}
