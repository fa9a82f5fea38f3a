"""Both checkpoints are opened here, each as a module and as tensors by the network's names."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrc_cli.checkpoint.read_by_others import PROCESSOR_FILES, TOKENIZER_FILES
from lrc_cli.checkpoint.source import Source, open_source
from lrc_cli.config.certify import Checkpoint
from lrc_cli.data.processors import open_tokenizer
from lrc_cli.forms import FORMS
from lrc_cli.network.disk_names import module_names
from lrc_cli.network.factories import ask_for_factory
from lrc_cli.network.keys import Keys
from lrc_cli.network.low_rank.stored import StoredLayer, dense_weight, stored_layers
from lrc_cli.network.opening import open_module
from lrc_cli.runtime.files import hash_file

DENSE, FACTORISED = "dense", "low-rank factors of lrc"


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two checkpoints, opened."""

    module: nn.Module
    """The module, before `make_network`."""
    source: Source
    """The checkpoint as the module sees it."""
    tokenizer: Any
    """The checkpoint's own tokenizer, or None."""
    form: str
    """How its weights are stored, in words."""
    path: Path
    """The directory or the file that was given."""
    files: tuple[Path, ...]
    """The files that make the network and its inputs; a model card may change."""
    num_bytes: int
    """The bytes of all stored tensors."""
    notes: tuple[str, ...] = ()
    """What a reader must know of the way in which it was read, in sentences."""

    def name_of(self, file: Path) -> str:
        """Returns a file's name in the directory, or the name of the only file."""
        return file.name if self.path.is_file() else file.relative_to(self.path).as_posix()

    def hashes(self) -> dict[str, str]:
        """Returns the sha256 of every file of `files`, by name."""
        return {self.name_of(file): hash_file(file) for file in self.files}

    @property
    def num_parameters(self) -> int:
        """The number of entries of all stored tensors."""
        return sum(info.num_elements for info in self.source.tensors.values())


def open_side(checkpoint: Checkpoint, *, factorised: bool) -> Side:
    """Opens a checkpoint with the project's reader of weights.

    Args:
        checkpoint: the section of the config.
        factorised: whether the checkpoint may be an output of lrc's.

    Raises:
        InputError: the checkpoint cannot be opened, or its module cannot be built.
    """
    source = open_source(
        Path(checkpoint.path), state_dict=checkpoint.state_dict, factorised=factorised
    )
    if source.config is None and checkpoint.factory is None:
        raise ask_for_factory(source.path)
    module, source = open_module(
        source, factory=checkpoint.factory, trust_remote_code=checkpoint.trust_remote_code
    )
    tokenizer = open_tokenizer(source, trust_remote_code=checkpoint.trust_remote_code)
    form = DENSE if source.layer_table is None else FACTORISED
    return Side(
        module=module,
        source=source,
        tokenizer=tokenizer,
        form=form,
        path=source.path,
        files=_files(source),
        num_bytes=source.num_bytes,
    )


def _files(source: Source) -> tuple[Path, ...]:
    """Returns the files that make a network and its inputs."""
    if source.path.is_file():
        return (source.path,)
    beside = (*TOKENIZER_FILES, *PROCESSOR_FILES, "*.py")
    found = {file for pattern in beside for file in source.path.glob(pattern) if file.is_file()}
    return (*source.decisive, *sorted(found - {*source.decisive}))


def network_names(module: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Returns the name in the network of each stored tensor; the key itself where it has none."""
    keys = list(keys)
    found = module_names(module, keys)
    return {key: found.get(key, key) for key in keys}


class DenseTensors(Mapping[str, Tensor]):
    """The dense tensors of a checkpoint by the network's names, each read when it is asked for.

    Layers that are stored as factors are multiplied out, in float32 at least.

    Args:
        side: the checkpoint.
        module: the module whose names count: the original's, for both checkpoints.
        keys: the key of each layer's weight in the original, by the layer's name.
    """

    def __init__(self, side: Side, module: nn.Module, keys: Mapping[str, str]) -> None:
        self._source = side.source
        stored = {keys.get(n, f"{n}.weight"): layer for n, layer in stored_layers(side.module)}
        own = network_names(module, stored)
        self._layers = {own[key]: layer for key, layer in stored.items()}
        parts = set(_parts(side.source))
        kept = [key for key in side.source.tensors if key not in parts]
        self._keys = {name: key for key, name in network_names(module, kept).items()}
        self.shapes: dict[str, tuple[int, ...]] = {
            name: side.source.tensors[key].shape for name, key in self._keys.items()
        }
        self.shapes |= {name: _shape(layer) for name, layer in self._layers.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._layers:
            layer = self._layers[name]
            return layer.layout.weight(dense_weight(layer))
        return self._source.read(self._keys[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _parts(source: Source) -> Iterator[str]:
    """Yields the keys of the tensors that layers are stored as, in a checkpoint of lrc's."""
    for name, entry in (source.layer_table or {}).items():
        keys = Keys.of(name, source.tensors)
        yield from (keys.key(end) for end in FORMS[entry["storage"]].tensors)


def _shape(layer: StoredLayer) -> tuple[int, ...]:
    return tuple(layer.layout.weight(torch.empty(layer.shape, device="meta")).shape)
