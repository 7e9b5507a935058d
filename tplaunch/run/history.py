"""The story of a run, told by its events: how it ended, what it saved, what to resume from, which jobs hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from tplaunch.run.events import (
    AttemptBegan,
    AttemptEnded,
    BadNodes,
    Branched,
    CheckpointDamaged,
    Done,
    Event,
    OtherWorkers,
    Resumed,
    Saved,
    Started,
    Stopped,
    Submitted,
)


@dataclass(frozen=True)
class History:
    """A run's events, oldest first, and what follows from them.

    Args:
        events: all, or those of a part of the run.
    """

    events: Sequence[Event]

    @cached_property
    def steps_done(self) -> int:
        """The last step that a finished run reached; 0: it was never done."""
        return max((event.step for event in self.events if isinstance(event, Done)), default=0)

    @cached_property
    def parent(self) -> Branched | None:
        """The run, and the step of it, that this one branched from; None: it began by itself."""
        return next((event for event in reversed(self.events) if isinstance(event, Branched)), None)

    @cached_property
    def newest_checkpoint(self) -> int | None:
        """The step of the newest checkpoint that was completed."""
        steps = [event.step for event in self.events if isinstance(event, Saved)]
        return steps[-1] if steps else None

    @cached_property
    def damaged(self) -> frozenset[str]:
        """Checkpoints that were found damaged, and not written anew since."""
        found: set[str] = set()
        for event in self.events:
            if isinstance(event, CheckpointDamaged):
                found.add(event.path)
            elif isinstance(event, Saved):
                found.discard(event.path)
        return frozenset(found)

    @cached_property
    def attempts(self) -> int:
        """How often the ranks were started."""
        return sum(isinstance(event, AttemptBegan) for event in self.events)

    @cached_property
    def latest_attempt(self) -> History:
        """The events since the ranks were last started."""
        starts = [i for i, event in enumerate(self.events) if isinstance(event, AttemptBegan)]
        return History(self.events[starts[-1] :] if starts else self.events)

    @property
    def ending(self) -> Literal["done", "stopped", "turned", "failed"]:
        """How the latest attempt ended, by what its ranks noted; turned: other workers are to go on."""
        for event in reversed(self.latest_attempt.events):
            if isinstance(event, Done):
                return "done"
            if isinstance(event, OtherWorkers):
                return "turned"
            if isinstance(event, Stopped):
                return "stopped"
        return "failed"

    @property
    def trained(self) -> bool:
        """Whether the latest attempt came as far as its first step."""
        return any(isinstance(event, (Started, Resumed)) for event in self.latest_attempt.events)

    @property
    def end(self) -> AttemptEnded | BadNodes | None:
        """How the launcher judged the latest attempt; None where another one, or a submission, has begun since."""
        for event in reversed(self.events):
            if isinstance(event, (AttemptEnded, BadNodes)):
                return event
            if isinstance(event, (AttemptBegan, Submitted)):
                break
        return None

    @cached_property
    def failures_since_progress(self) -> int:
        """Attempts since the last progress: a new checkpoint, a stop on request, or a new submission."""
        failures, newest = 0, 0
        for event in self.events:
            match event:
                case AttemptBegan() | BadNodes():
                    failures += 1
                case Resumed(step=step):
                    newest = min(newest, step)  # sent back: its checkpoints from here on are new
                case Saved(step=step) if step > newest:
                    newest, failures = step, 0
                case Stopped() | Done() | Submitted() | OtherWorkers():
                    failures = 0
        return failures

    @cached_property
    def submission(self) -> Submitted | None:
        """The latest submission to Slurm."""
        return next((event for event in reversed(self.events) if isinstance(event, Submitted)), None)

    @property
    def submitted_jobs(self) -> list[str]:
        """The jobs of the latest submission, in the order of their chain."""
        return list(self.submission.jobs) if self.submission else []

    def jobs_after(self, job: str) -> list[str]:
        """The jobs of the chain that come after one of it."""
        jobs = self.submitted_jobs
        return jobs[jobs.index(job) + 1 :] if job in jobs else []

    def log_of(self, job: str) -> Path | None:
        """The log file of a job of the latest submission."""
        if self.submission is None or job not in self.submission.jobs:
            return None
        return Path(self.submission.logs[self.submission.jobs.index(job)])

    def resume_source(self, attempt: int, asked: str) -> str:
        """What a start of the ranks resumes from: as asked at an attempt's first start. Where torchrun starts the
        ranks again after they have saved, the newest checkpoint.

        Args:
            asked: auto, none, or a checkpoint's path.
        """
        started = False
        for event in self.events:
            started = started or (isinstance(event, Started) and event.attempt == attempt)
            if started and isinstance(event, Saved):
                return "auto"
        return asked
