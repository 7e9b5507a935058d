"""Where each rank is: `logs/attempt-K/rank-R.beat` holds step, time and part of the step, in one short line that is
written over in place. After a hang they show which rank was furthest behind, even if its process is stuck."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PARTS = ("set-up", "data", "forward and backward", "gradients", "update", "validation", "metrics", "checkpoint")
_WIDTH = 63
_NAME = re.compile(r"rank-(\d+)\.beat")


@dataclass(frozen=True)
class Beat:
    """A rank's last sign of life.

    Args:
        step: the step it was in, from 1; 0 before the first.
        time: when it entered that part of the step, unix seconds.
        part: the part, one of `PARTS`.
    """

    rank: int
    step: int
    time: float
    part: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.part}" if self.step else self.part

    @property
    def place(self) -> tuple[int, int]:
        """Grows as the rank goes on."""
        return self.step, PARTS.index(self.part)


class Heartbeat:
    """Writes the beats of one rank; a beat costs one `pwrite` of 64 bytes."""

    def __init__(self, path: Path, rank: int) -> None:
        self.rank = rank
        self._file = -1
        with suppress(OSError):  # as in `mark`
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.mark(0, "set-up")

    def mark(self, step: int, part: str) -> None:
        """Record that the rank has entered this part of a step, one of `PARTS`."""
        self.last = Beat(self.rank, step, time.time(), part)
        line = f"{step} {self.last.time:.3f} {part}".ljust(_WIDTH) + "\n"
        with suppress(OSError):  # a full or failing disk must not end the run for want of a beat
            os.pwrite(self._file, line.encode(), 0)


def read_beats(attempt_dir: Path) -> list[Beat]:
    """The last beats of the ranks of an attempt, by rank."""
    found = []
    for path in attempt_dir.glob("rank-*.beat"):
        name, words = _NAME.fullmatch(path.name), path.read_text().split(maxsplit=2)
        if name and len(words) == 3:
            found.append(Beat(int(name[1]), int(words[0]), float(words[1]), words[2].strip()))
    return sorted(found, key=lambda beat: beat.rank)


def trains(attempt_dir: Path) -> bool:
    """Whether a rank of an attempt has begun its first step."""
    return any(beat.step for beat in read_beats(attempt_dir))
