"""What a file of torch.save says of itself is compared here with what it holds.

torch takes the sizes in the pickle on trust: it maps a record as if it were not compressed, and
reads on behind a record that is too short. Both give numbers that nobody saved.
"""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lrc_cli.errors import InputError
from lrc_cli.reading import check_regular, file_size, open_regular

PICKLE_BYTES = 32_000_000
"""The most bytes of the pickle that describes the tensors."""
MOST_RECORDS = 1_000_000
SAVE_AGAIN = "save it again with torch.save"
COPY_AGAIN = "copy it again, it may be truncated"


def record_names(file: Path) -> list[str] | None:
    """Returns the names of the records of an archive; None for files from before torch 1.6.

    Raises:
        InputError: the file is no regular file, or no archive that can be read.
    """
    check_regular(file)
    with _readable(file):
        is_archive = zipfile.is_zipfile(file)
    if not is_archive:
        return None
    with _opened(file) as archive:
        return archive.namelist()


def check_archive(file: Path) -> None:
    """Checks the records of an archive that torch.save wrote; nothing is loaded.

    Raises:
        InputError: the pickle is too large, or a record is compressed, missing, or shorter or
            longer than the tensors' storage is said to be.
    """
    with _opened(file) as archive:
        _check_records(file, archive)


def check_old(file: Path) -> None:
    """Checks a file that torch.save wrote before torch 1.6: the storages lie behind the pickle.

    torch leaves storages as they are that the list behind the pickle does not name: their numbers
    are whatever lay in memory.

    Raises:
        InputError: a storage is missing, or shorter or longer than the pickle says.
    """
    size = file_size(file)
    with _readable(file), open_regular(file) as handle:
        for _ in range(3):  # a magic number, a version and the machine
            _StorageReader(handle).load()
        reader = _StorageReader(handle)
        reader.load()
        for key in _StorageReader(handle).load():
            count = int.from_bytes(handle.read(8), "little", signed=True)
            _check_storage(file, key, reader.storages.pop(key), count * reader.items[key])
            handle.seek(count * reader.items[key], 1)
        end = handle.tell()
    for key, num_bytes in reader.storages.items():
        _check_storage(file, key, num_bytes, None)
    if end > size:
        raise InputError(f"{file}: its storages end behind its {size:,} bytes", COPY_AGAIN)


def _check_storage(file: Path, key: str, needed: int, found: int | None) -> None:
    if found != needed:
        what = "missing" if found is None else f"{found:,} bytes long"
        cause = f"{file}: the record data/{key} is {what}, and {needed:,} bytes are needed"
        raise InputError(cause, COPY_AGAIN)


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    with _readable(file), open_regular(file) as handle, zipfile.ZipFile(handle) as archive:
        yield archive


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """A context in which every failure of a library on a file is a refusal of the file."""
    try:
        yield
    except InputError:
        raise
    # On a file that torch.save did not write, zipfile and pickle fail in any way.
    except Exception as error:
        cause = f"{file}: cannot be read as a file of torch.save ({type(error).__name__})"
        raise InputError(cause, COPY_AGAIN) from error


def check_storages(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises InputError where loaded tensors have more bytes than their file can have held.

    A shape in an old file may ask for more than its storage; torch fills the rest with anything.
    """
    size = file_size(file)
    storages: dict[int, int] = {}
    for key, tensor in tensors.items():
        if tensor.numel() * tensor.itemsize > size:
            raise InputError(
                f"{file}: tensor {key} of shape {tuple(tensor.shape)} would have more bytes than"
                f" the file ({size:,})",
                SAVE_AGAIN,
            )
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    if sum(storages.values()) > size:
        raise InputError(f"{file}: the tensors would have more bytes than the file", SAVE_AGAIN)


def _check_records(file: Path, archive: zipfile.ZipFile) -> None:
    infos = archive.infolist()
    if len(infos) > MOST_RECORDS:
        raise InputError(f"{file}: has more than {MOST_RECORDS:,} records", SAVE_AGAIN)
    records = {info.filename: info for info in infos}
    if len(records) < len(infos):
        raise InputError(f"{file}: has two records of one name", SAVE_AGAIN)
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            cause = f"{file}: the record {info.filename} is compressed or encrypted"
            raise InputError(cause, f"{SAVE_AGAIN}, which does neither")
    described = next((name for name in records if name.endswith("/data.pkl")), None)
    if described is None:
        return  # torch says what it misses
    if records[described].file_size > PICKLE_BYTES:
        raise InputError(
            f"{file}: its pickle has more than {PICKLE_BYTES:,} bytes",
            "save only the state dict: torch.save(model.state_dict(), FILE)",
        )
    stem = described.removesuffix("data.pkl")
    with archive.open(described) as pickled:
        storages = _storages(pickled)
    for key, num_bytes in storages.items():
        record = records.get(f"{stem}data/{key}")
        _check_storage(file, key, num_bytes, None if record is None else record.file_size)


def _storages(pickled: Any) -> dict[str, int]:
    """Returns the bytes of each storage that a pickle of torch.save names, by its record's key."""
    reader = _StorageReader(pickled)
    reader.load()
    return reader.storages


class _Inert:
    """Stands for every object in the pickle: it takes anything and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Takes an item."""

    def extend(self, values: Any) -> None:
        """Takes items."""

    def add(self, value: Any) -> None:
        """Takes an item."""


def _storage(item_bytes: int) -> type:
    return type("_Storage", (_Inert,), {"item_bytes": item_bytes})


_STORAGES = {
    f"{name}Storage": _storage(item_bytes)
    for item_bytes, names in {
        1: ("Untyped", "Bool", "Byte", "Char", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"),
        2: ("Half", "BFloat16", "Short"),
        4: ("Float", "Int", "QInt32"),
        8: ("Double", "Long", "ComplexFloat"),
        16: ("ComplexDouble",),
    }.items()
    for name in names
}
"""The classes that torch.save names for storages; their names tell the bytes of an entry."""


# The unpickler in C would reserve memory for any number that the pickle gives to an object.
class _StorageReader(pickle._Unpickler):
    """Reads which storages a pickle names, and makes no object of any class that it names."""

    def __init__(self, pickled: Any) -> None:
        super().__init__(pickled)
        self.storages: dict[str, int] = {}
        """The bytes of each storage."""
        self.items: dict[str, int] = {}
        """The bytes of an entry of each storage."""

    def find_class(self, module: str, name: str) -> Any:
        return _STORAGES.get(name, _Inert)

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count, *_ = pid
        size = count * kind.item_bytes
        self.items[str(key)] = kind.item_bytes
        if self.storages.setdefault(str(key), size) != size:
            raise pickle.UnpicklingError(f"two sizes of the record {key}")
        return _Inert()
