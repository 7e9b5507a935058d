"""Loading tensors of a checkpoint: the one way that everything takes, and nothing of the checkpoint runs on it.

torch's own reader unpickles `.metadata` with no questions asked, and one of the rank's own (`__0.metadata`) where the
first fails; ours gives it what `metadata.read_metadata` has read. The tensors themselves it loads with weights_only.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader

from tplaunch.checkpoint.metadata import Stored, StoredTensor, read_metadata
from tplaunch.errors import Problem, TplaunchError


def load_tensors(
    tensors: dict[str, Any], checkpoint: Path, *, group: dist.ProcessGroup | None = None, alone: bool = False
) -> None:
    """Fill tensors from a checkpoint, in place. Every rank calls it, unless `alone`.

    Args:
        tensors: by global name, of the global shapes that the checkpoint has; DTensors get their shards.
        checkpoint: its directory.
        group: the ranks that load; default: all.
        alone: only this process loads.

    Raises:
        TplaunchError: the checkpoint lacks one, is damaged, or would run code; one line.
    """
    try:
        stored = read_metadata(checkpoint)
    except ValueError as error:
        raise TplaunchError(Problem(f"{checkpoint}: {error}")) from None
    load_by(_Reader(checkpoint, stored), tensors, checkpoint, group=group, alone=alone)


def load_by(
    reader: StorageReader,
    tensors: dict[str, Any],
    path: Path,
    *,
    group: dist.ProcessGroup | None = None,
    alone: bool = False,
) -> None:
    """Fill tensors by a reader of some format; see `load_tensors`.

    Args:
        reader: the reader.
        path: what it reads.

    Raises:
        TplaunchError: see `load_tensors`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no process group is there
        try:
            load(tensors, storage_reader=reader, process_group=group, no_dist=alone)
        except CheckpointException as error:  # a BaseException: what DCP gathered from the ranks that failed
            cause, _ = next(iter(error.failures.values()))
            raise TplaunchError(Problem(f"{path}: {_words(cause)}")) from None


def _words(cause: BaseException) -> str:
    if isinstance(cause, pickle.UnpicklingError):
        return "one of its files holds more than numbers, which could run code, or is damaged"
    return f"cannot be loaded: {type(cause).__name__}: {' '.join(str(cause).split())[:200]}"


class _Reader(FileSystemReader):
    """DCP's reader of files, for metadata that was read safely."""

    def __init__(self, checkpoint: Path, stored: Stored) -> None:
        super().__init__(checkpoint)
        self._stored = stored

    # Without **kwargs: DCP would ask for the rank's own metadata where this fails.
    def read_metadata(self) -> Metadata:
        return Metadata(
            state_dict_metadata={name: _describe(tensor) for name, tensor in self._stored.tensors.items()},
            storage_data={
                MetadataIndex(place.tensor, place.offsets, place.hint): _Slice(place.file, place.start, place.length)
                for place in self._stored.places
            },
            storage_meta=StorageMeta(load_id=self.load_id),
        )


class _Slice(NamedTuple):
    """What DCP's reader asks of a piece: the fields of its own private class."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: None = None


def _describe(tensor: StoredTensor) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in tensor.chunks]
    return TensorStorageMetadata(TensorProperties(dtype_of(tensor)), torch.Size(tensor.size), chunks)


def dtype_of(tensor: StoredTensor) -> torch.dtype:
    """The dtype that a tensor is stored in."""
    dtype = getattr(torch, tensor.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
