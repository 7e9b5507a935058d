"""What `.metadata` of a checkpoint says: which tensors there are, and where in its files. Torch-free.

DCP writes it as a pickle, which is a program: `pickle.load` calls whatever it names. Here only the names that DCP
itself writes are allowed (as Megatron-Core's `safe_globals` does), and even these stand for empty shells that keep
what the pickle gives them, so that nothing of torch, nor of the checkpoint, runs. What comes out is plain data.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any, NamedTuple

from tplaunch.files import Unsafe, inside, open_regular

METADATA = ".metadata"
Shape = tuple[int, ...]

_DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
_OF_METADATA = ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")
_OF_TENSORS = ("TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")
# Nothing for what is no tensor (`BytesStorageMetadata`): DCP would unpickle it, and we store none.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {*_OF_METADATA, *_OF_TENSORS},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},  # where it was written: not looked at
    "pathlib._local": {"PosixPath"},  # so named by Python 3.13
}


class StoredTensor(NamedTuple):
    """One tensor of a checkpoint.

    Args:
        dtype: torch's name of it, such as "float32".
        size: its global shape.
        chunks: (offsets, sizes) of its pieces, which together make it up.
    """

    dtype: str
    size: Shape
    chunks: list[tuple[Shape, Shape]]


class Place(NamedTuple):
    """Where one piece of a tensor lies.

    Args:
        tensor: its global name.
        offsets: where in the tensor the piece begins.
        hint: its place among the tensor's chunks, where it is known.
        file: a file of the checkpoint's folder.
        start, length: bytes of it.
    """

    tensor: str
    offsets: Shape | None
    hint: int | None
    file: str
    start: int
    length: int


class Stored(NamedTuple):
    """The tensors of a checkpoint by their global names, and the places of all their pieces."""

    tensors: dict[str, StoredTensor]
    places: list[Place]


def read_metadata(checkpoint: Path) -> Stored:
    """Read `.metadata` of a checkpoint; nothing in it is executed.

    Raises:
        Unsafe: it names what no checkpoint needs, or files outside the folder, or is no metadata of tensors.
        ValueError: it cannot be read.
    """
    try:
        with open_regular(checkpoint / METADATA) as file:
            return _stored(_Unpickler(file).load(), checkpoint)
    except Unsafe as error:
        raise Unsafe(f"{METADATA} {error}") from None
    except OSError as error:
        raise ValueError(f"{METADATA} cannot be read: {error.strerror}") from None
    except Exception as error:  # a pickle that is torn or crafted raises anything
        raise Unsafe(f"{METADATA} is damaged: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


class _Shell:
    """What a pickle has of an object: what it is made with, and its state. Its class stands for the name."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Shell:
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._shells: dict[tuple[str, str], type[_Shell]] = {}

    def find_class(self, module: str, name: str) -> type[_Shell]:
        if name not in _ALLOWED.get(module, ()):
            raise Unsafe(f"names {f'{module}.{name}'[:100]!r}, which no checkpoint needs and which could run code")
        return self._shells.setdefault((module, name), type(name, (_Shell,), {}))


def _stored(root: Any, checkpoint: Path) -> Stored:
    fields = _fields(root, "Metadata")
    tensors = {_text(name): _tensor(_text(name), entry) for name, entry in fields["state_dict_metadata"].items()}
    places = [_place(index, info) for index, info in fields["storage_data"].items()]
    for file in {place.file for place in places}:
        inside(checkpoint, file)
    return Stored(tensors, places)


def _tensor(name: str, entry: Any) -> StoredTensor:
    fields = _fields(entry, "TensorStorageMetadata")
    size = _shape(fields["size"])
    chunks = []
    for chunk in fields["chunks"]:
        parts = _fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = _shape(parts["offsets"]), _shape(parts["sizes"])
        if any(o + s > n for o, s, n in zip(offsets, sizes, size, strict=True)):
            raise ValueError(f"a piece of {name!r} lies outside it")
        chunks.append((offsets, sizes))
    if sum(math.prod(sizes) for _, sizes in chunks) != math.prod(size):  # as DCP checks when it writes
        raise ValueError(f"the pieces of {name!r} do not make it up")
    dtype = _shell(fields["properties"], "TensorProperties").state[0]
    if not (isinstance(dtype, type) and issubclass(dtype, _Shell) and dtype.__name__ in _DTYPES):
        raise ValueError(f"{name!r} has no dtype")
    return StoredTensor(dtype.__name__, size, chunks)


def _place(index: Any, info: Any) -> Place:
    of, where = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
    if where.get("transform_descriptors"):
        raise ValueError("pieces are packed in a way that is not ours")
    offsets, hint = of.get("offset"), of.get("index")
    return Place(
        _text(of["fqn"]),
        None if offsets is None else _shape(offsets),
        None if hint is None else _number(hint),
        _text(where["relative_path"]),
        _number(where["offset"]),
        _number(where["length"]),
    )


def _shell(value: Any, name: str) -> _Shell:
    if not (isinstance(value, _Shell) and type(value).__name__ == name):
        raise ValueError(f"a {name} is missing")
    return value


def _fields(value: Any, name: str) -> dict[str, Any]:
    state = _shell(value, name).state
    if not isinstance(state, dict):
        raise ValueError(f"a {name} has no fields")
    return state


def _shape(value: Any) -> Shape:
    (numbers,) = _shell(value, "Size").args
    return tuple(_number(number) for number in numbers)


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("a size is no number of bytes or elements")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name is no text")
    return value
