"""Slices of our parameters, read from a Hugging Face folder by byte ranges: of its files, only what is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from tplaunch.errors import Problem, TplaunchError
from tplaunch.files import open_regular
from tplaunch.huggingface.source import Source, Stored
from tplaunch.huggingface.ways import blocks
from tplaunch.parallel.precision import COMPUTE_DTYPE

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Slices:
    """A folder, open to be read. Use as a context manager.

    Attributes:
        nonfinite: of the tensors read so far, those with numbers that are NaN or infinite: how many.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.nonfinite: dict[str, int] = {}
        self._files: dict[Path, BinaryIO] = {}

    def __enter__(self) -> Slices:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def dtype(self, name: str) -> torch.dtype:
        """What holds a parameter exactly."""
        dtype = COMPUTE_DTYPE[self.source.precision]
        return torch.promote_types(dtype, torch.float32) if self.source.parts[name].said[0][0].wide else dtype

    def fill(self, name: str, target: Tensor, offsets: Sequence[int]) -> None:
        """Read a slice of a parameter; rows that pad the vocabulary are zero. Beside the target, one tensor's part of
        the slice is held.

        Args:
            name: the parameter's.
            target: of one dim or two, on any device, in any floating-point dtype.
            offsets: where it begins in the parameter.

        Raises:
            OSError: a file cannot be read, or ends early.
        """
        top, end = offsets[0], offsets[0] + target.shape[0]
        left, columns = (offsets[1], target.shape[1]) if target.dim() > 1 else (0, 1)
        flat = target if target.dim() > 1 else target[:, None]
        known = 0  # rows that the files say
        for tensor, place in self.source.parts[name].said:
            stored = self.source.stored[tensor.name]
            for block in blocks(tensor, place):
                known = max(known, block.first + block.rows)
                first, last = max(top, block.first), min(end, block.first + block.rows)
                if first >= last or not columns:
                    continue
                start = block.start + (first - block.first) * block.down + left * block.right
                mine = self._read(stored, start, (last - first, block.down), (columns, block.right))
                if bad := mine.numel() - int(mine.isfinite().sum()):
                    self.nonfinite[stored.key] = self.nonfinite.get(stored.key, 0) + bad
                flat[first - top : last - top].copy_(mine)
        flat[max(0, known - top) :].zero_()

    def _read(self, stored: Stored, start: int, down: tuple[int, int], right: tuple[int, int]) -> Tensor:
        """Numbers of a tensor by their places.

        Args:
            start: the first.
            down, right: of rows and of columns, how many there are, and how far one is from the next.
        """
        if down[1] < right[1]:
            return self._read(stored, start, right, down).t()
        (rows, pitch), (columns, step) = down, right
        span = (columns - 1) * step + 1
        if span + step > pitch or rows == 1:  # lines follow each other, with nothing between that is not asked for
            lines = torch.empty(rows * pitch, dtype=_DTYPES[stored.dtype])
            self._get(stored, start, lines[: (rows - 1) * pitch + span])
            return lines.view(rows, pitch)[:, :span:step]
        lines = torch.empty(rows, span, dtype=_DTYPES[stored.dtype])
        for number, line in enumerate(lines):
            self._get(stored, start + number * pitch, line)
        return lines[:, ::step]

    def _get(self, stored: Stored, start: int, into: Tensor) -> None:
        """Fill a tensor with numbers that follow each other."""
        if stored.file not in self._files:
            self._files[stored.file] = open_regular(stored.file)
        view, at = memoryview(into.view(torch.uint8).numpy()), stored.begin + start * into.itemsize
        while view:
            if not (count := os.preadv(self._files[stored.file].fileno(), [view], at)):
                raise OSError(f"{stored.file} ends within {stored.key}")
            view, at = view[count:], at + count


def refuse_nonfinite(folder: Path, found: dict[str, int], *, key: str = "") -> None:
    """Refuse numbers that are NaN or infinite.

    Args:
        found: see `Slices.nonfinite`.
        key: the recipe's, that names the folder.

    Raises:
        TplaunchError: there are some; says where.
    """
    if found:
        said = [f"{count:,} of {name}" for name, count in sorted(found.items())]
        more = f", and of {len(said) - 3} tensors more" if len(said) > 3 else ""
        what = f"{folder}: numbers are NaN or infinite: {', '.join(said[:3])}{more}"
        raise TplaunchError(Problem(what, key=key))
