"""Where a step's time goes, and where it makes the host wait.

    python -m tests.gpu.look SHAPE CONTENDER FOLDER FILE

Writes FOLDER/profile-SHAPE-CONTENDER.txt, the 25 kernels that take longest, and a JSON object to FILE: the host's waits
of a step, each with the line of tplaunch that causes it. On a GPU they are what `torch.cuda.set_sync_debug_mode` warns
of; on the CPU, which never waits, the reads of a tensor's value that would be waits there, where nothing is compiled.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.profiler import profile

import tplaunch
from tests.gpu.alone import alone
from tests.gpu.machine import take_device
from tests.gpu.shapes import SHAPES
from tests.gpu.speed import CONTENDERS

PACKAGE = f"{Path(tplaunch.__file__).parent}/"
KERNELS = 25
READS = (Tensor.tolist, Tensor.item, Tensor.nonzero, Tensor.__bool__, Tensor.__int__, Tensor.__float__)


def place() -> str:
    """The innermost line of tplaunch that is being run."""
    frames = traceback.extract_stack()
    for frame in reversed(frames):
        if frame.filename.startswith(PACKAGE):
            return f"{frame.filename.removeprefix(PACKAGE)}:{frame.lineno} {frame.line}"
    return "outside tplaunch: " + " < ".join(f"{frame.name}:{frame.lineno}" for frame in frames[-1:-6:-1])


class _Reads(TorchFunctionMode):
    """Notes every read of a tensor's value by the host."""

    def __init__(self, places: Counter[str]) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.places[place()] += 1
        return func(*args, **(kwargs or {}))


def waits(step: Callable[[], object], device: torch.device) -> Counter[str]:
    """How often each line of tplaunch makes the host wait in a step."""
    places: Counter[str] = Counter()
    if device.type == "cpu":
        with _Reads(places):
            step()
        return places

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            places[place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return places


def main(shape: str, contender: str, folder: str, file: str) -> None:
    device = take_device()
    with alone():
        step = CONTENDERS[contender](SHAPES[shape], device)
        for _ in range(3):
            step()
        found = waits(step, device) if device.type == "cuda" or contender == "tplaunch" else Counter()
        with profile() as profiled:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    order = f"self_{device.type}_time_total"
    text = profiled.key_averages().table(sort_by=order, row_limit=KERNELS, max_name_column_width=80)
    (Path(folder) / f"profile-{shape}-{contender}.txt").write_text(text)
    Path(file).write_text(json.dumps(dict(found.most_common())))


if __name__ == "__main__":
    main(*sys.argv[1:])
