"""torch's flight recorder: the collectives that a process has begun, to be read after a hang.

gloo's are written by the worker that fails, as JSON (`logs/attempt-K/rank-R.flight.json`); NCCL's by its watchdog on
every rank when one of them waits in vain, for `torchfrtrace -p nccl-flight- logs/attempt-K`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

NCCL_PREFIX = "nccl-flight-"


def remember_collectives(attempt_dir: Path) -> None:
    """Tell torch to keep a record; call it before torch is imported. What the user has set already is kept."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(attempt_dir / NCCL_PREFIX))  # torch adds the rank


def collectives() -> bytes:
    """The record of this process as JSON; empty before the first collective, and where torch keeps none."""
    c10d = sys.modules.get("torch._C._distributed_c10d")
    if c10d is None or not hasattr(c10d, "_dump_fr_trace_json"):  # not a public function
        return b""
    record: bytes = c10d._dump_fr_trace_json()
    return record if json.loads(record).get("entries") else b""


def last_collective(record: bytes) -> str:
    """The newest of a record, such as "gloo:all_reduce of [[64, 32]]"; "" of an empty one."""
    if not record:
        return ""
    newest = json.loads(record)["entries"][-1]
    return f"{newest['profiling_name']} of {newest['input_sizes']}"
