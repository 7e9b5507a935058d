"""Readers of metric records, each on a thread of its own: whatever becomes of a server or a disk, the trainer only
ever puts a record into a queue."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

FIRST_S = 10.0  # after which a mirror opens without a record
_NAMES = {
    **{key: f"throughput/{key}" for key in ("tokens_per_s", "tokens_per_s_per_gpu", "step_time_s", "data_time_s")},
    **{key: f"throughput/{key}" for key in ("tflops_per_gpu", "mfu")},
    "memory_peak_gib": "memory/peak_gib",
}


def grouped(record: Mapping[str, Any]) -> dict[str, Any]:
    """A metrics record under the groups of dashboards: `throughput/`, `memory/`, else `train/`.

    Names that have a group already, such as `validation/loss`, keep it; `step` and `time` are each dashboard's own.
    """
    return {
        key if "/" in key else _NAMES.get(key, f"train/{key}"): value
        for key, value in record.items()
        if key not in ("step", "time")
    }


@dataclass(frozen=True)
class Entry:
    """What is mirrored of one step.

    Args:
        record: its metrics record.
        ranks: the rows of all ranks (`run.ranks`), where they were measured.
        texts: that the model wrote (`run.samples`); then the record is but their step.
    """

    record: dict[str, Any]
    ranks: Sequence[dict[str, Any]] = ()
    texts: Sequence[dict[str, Any]] = ()


class Mirror:
    """Takes records on one thread and hands them to another, from the first record on: what a mirror imports would
    take half a second of Python from a first step. No method raises, or waits but for `finish`."""

    def __init__(self) -> None:
        self._entries: SimpleQueue[Entry | None] = SimpleQueue()
        self._begun = threading.Event()
        self._thread: threading.Thread | None = None

    def log(self, record: Mapping[str, Any], ranks: Sequence[dict[str, Any]] = ()) -> None:
        """Queue the record of one step; holds `step`."""
        self._put(Entry(dict(record), ranks))

    def log_texts(self, texts: Sequence[dict[str, Any]]) -> None:
        """Queue the texts of one step, before its record where it has one."""
        self._put(Entry({"step": texts[0]["step"]}, texts=texts))

    def _start(self, name: str) -> None:
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _end(self, timeout_s: float) -> None:
        """Let the thread end after what is queued; wait so long."""
        self._put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _put(self, entry: Entry | None) -> None:
        if self._thread is not None:
            self._entries.put(entry)
            self._begun.set()

    def _run(self) -> None:
        self._begun.wait(FIRST_S)
        self._mirror()

    def _mirror(self) -> None:
        """The thread: ends when `_next` gives None."""
        raise NotImplementedError

    def _next(self, timeout_s: float | None = None) -> Entry | None:
        """The next entry; None when there will be none.

        Raises:
            queue.Empty: none has come in time.
        """
        return self._entries.get(timeout=timeout_s)
