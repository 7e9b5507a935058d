"""What is read of a checkpoint's metadata, as torch writes it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tplaunch.checkpoint.metadata import METADATA, Place, StoredTensor, read_metadata


def write(folder: Path, dtype: Any, shape: tuple[int, ...] = (4, 3)) -> None:
    """A tensor [4, 3], or what says that it is another, in two pieces."""
    first, second = torch.Size([0, 0]), torch.Size([3, 0])
    pieces = [ChunkStorageMetadata(first, torch.Size([3, 3])), ChunkStorageMetadata(second, torch.Size([1, 3]))]
    tensor = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), pieces)
    places = {
        MetadataIndex("w", first, 0): _StorageInfo("a.distcp", 0, 36),
        MetadataIndex("w", second): _StorageInfo("b.distcp", 8, 12),
        MetadataIndex("w"): _StorageInfo("b.distcp", 20, 1),
    }
    (folder / METADATA).write_bytes(pickle.dumps(Metadata({"w": tensor}, storage_data=places)))


def test_tensors_and_the_places_of_their_pieces(tmp_path: Path) -> None:
    write(tmp_path, torch.bfloat16)
    for file in ("a.distcp", "b.distcp"):
        (tmp_path / file).touch()
    stored = read_metadata(tmp_path)
    assert stored.tensors == {"w": StoredTensor("bfloat16", (4, 3), [((0, 0), (3, 3)), ((3, 0), (1, 3))])}
    assert stored.places == [
        Place("w", (0, 0), 0, "a.distcp", 0, 36),
        Place("w", (3, 0), None, "b.distcp", 8, 12),
        Place("w", None, None, "b.distcp", 20, 1),
    ]


@pytest.mark.parametrize("dtype", [torch.Size, "float32", 7])
def test_what_is_no_dtype_is_refused(tmp_path: Path, dtype: Any) -> None:
    write(tmp_path, dtype)
    with pytest.raises(ValueError, match="'w' has no dtype"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("shape", [(4,), (4, 3, 1), (12,), (3, 4), (5, 3)])
def test_pieces_that_are_not_of_the_tensor_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    write(tmp_path, torch.float32, shape)
    with pytest.raises(ValueError, match="damaged"):
        read_metadata(tmp_path)
