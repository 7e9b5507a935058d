"""The run directory: where everything that belongs to one run lies, and the files that all processes share.

One run, one directory, however often it restarts. `events.jsonl` and `metrics.jsonl` hold one JSON object
a line; each line is appended by one write, so that a crash can tear only the last one.
"""

from __future__ import annotations

import fcntl
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tplaunch.errors import Problem, TplaunchError
from tplaunch.files import Record, append_line, parse_lines, read_lines, to_line
from tplaunch.run.events import Event, parse_event
from tplaunch.run.history import History
from tplaunch.run.records import read_records

if TYPE_CHECKING:
    from tplaunch.recipe.schema import Recipe

# Set in the environment of ranks whose launcher holds the run directory's lock for them.
LOCKED = "TPLAUNCH_LOCKED"


@dataclass(frozen=True)
class RunDir:
    """The paths of a run, and its event log. Nothing is made before `create`."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def ranks(self) -> Path:
        """What each rank measured, a line a rank (`run.ranks`)."""
        return self.root / "ranks.jsonl"

    @property
    def samples(self) -> Path:
        """Texts that the model wrote while it was trained, a line a prompt (`run.samples`)."""
        return self.root / "samples.jsonl"

    @property
    def evaluations(self) -> Path:
        """What its checkpoints were found to know, a line a result (`run.evaluations`)."""
        return self.root / "evaluations.jsonl"

    @property
    def plan(self) -> Path:
        """What was predicted of the run (`plan.estimate.Plan.as_dict`), where the table has its GPU."""
        return self.root / "plan.json"

    @property
    def events(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def wandb(self) -> Path:
        return self.root / "wandb"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def profile(self) -> Path:
        """Traces of steps, and snapshots of GPU memory (`logging.profile`)."""
        return self.root / "profile"

    @property
    def slurm(self) -> Path:
        return self.root / "slurm"

    @property
    def data_facts(self) -> Path:
        """What the samples are made of (`data.fingerprint.data_facts`); each checkpoint keeps a copy."""
        return self.root / "data.json"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of the run; each checkpoint keeps a copy."""
        return self.root / "tokenizer.json"

    @property
    def fault_marker(self) -> Path:
        """Is there once a fault was injected on purpose (`TPLAUNCH_FAULT`)."""
        return self.root / "fault-injected"

    @property
    def request(self) -> Path:
        """What a helper module is asked for (`launch.helper`)."""
        return self.root / "request.json"

    @property
    def result(self) -> Path:
        """What a helper module answers."""
        return self.root / "result.json"

    @property
    def refusal(self) -> Path:
        """Why a helper module does not answer, where the user can mend it."""
        return self.root / "refusal.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def launch_log(self) -> Path:
        """What a launch had to say after the reader of its output was gone."""
        return self.logs / "launch.log"

    @property
    def hook_log(self) -> Path:
        """What the command of `logging.on_event` printed."""
        return self.logs / "on_event.log"

    @property
    def lock_file(self) -> Path:
        return self.root / "lock"

    def attempt_dir(self, attempt: int) -> Path:
        return self.logs / f"attempt-{attempt}"

    def rank_log(self, attempt: int, rank: int) -> Path:
        """What a rank printed (stdout and stderr)."""
        return self.attempt_dir(attempt) / f"rank-{rank}.log"

    def rank_error(self, attempt: int, rank: int) -> Path:
        """The exception that ended a rank, and where it was (`worker.describe_error`)."""
        return self.attempt_dir(attempt) / f"rank-{rank}.error.json"

    def rank_flight(self, attempt: int, rank: int) -> Path:
        """The last collectives of a rank that failed (`run.flight`)."""
        return self.attempt_dir(attempt) / f"rank-{rank}.flight.json"

    def beat(self, attempt: int, rank: int) -> Path:
        """Where a rank is: step, time and part of the step (`run.heartbeat`)."""
        return self.attempt_dir(attempt) / f"rank-{rank}.beat"

    def torchrun_log(self, attempt: int) -> Path:
        """What torchrun itself printed."""
        return self.attempt_dir(attempt) / "torchrun.log"

    def last_beat(self) -> float | None:
        """When a rank of the latest attempt last gave a sign of life, unix seconds (`run.heartbeat`)."""
        beats = self.attempt_dir(self.last_attempt()).glob("rank-*.beat")
        return max((beat.stat().st_mtime for beat in beats), default=None)

    def create(self) -> None:
        """Make the directory; one that exists is kept as it is.

        Raises:
            TplaunchError: it cannot be made or written.
        """
        try:
            for path in (self.root, self.logs, self.checkpoints, self.wandb):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TplaunchError(
                Problem(
                    f"cannot make the run directory {self.root}", why=str(error), fix="choose another: --run-dir DIR"
                )
            ) from error

    def last_attempt(self) -> int:
        """The number of the newest attempt; 0 before the first."""
        names = (path.name for path in self.logs.glob("attempt-*"))
        return max((int(m[1]) for name in names if (m := re.fullmatch(r"attempt-(\d+)", name))), default=0)

    def next_attempt(self) -> int:
        """Make the log directory of a new attempt and return its number, from 1; no two callers get the same."""
        self.logs.mkdir(parents=True, exist_ok=True)
        attempt = self.last_attempt() + 1
        while True:
            try:
                self.attempt_dir(attempt).mkdir()
            except FileExistsError:
                attempt += 1
            else:
                return attempt

    def append(self, event: Event) -> None:
        """Append an event to `events.jsonl`; any process may."""
        append_line(self.events, event.to_record())

    def history(self) -> History:
        """Read the run's events."""
        return History([event for line in read_lines(self.events) if (event := parse_event(line)) is not None])

    def read_metrics(self) -> list[Record]:
        """Read the metrics records, one of each logged step; lines that are none are left out."""
        return read_records(self.metrics)[0]

    def count_bad_metrics(self) -> int:
        """Count the lines of `metrics.jsonl` that are no records."""
        return read_records(self.metrics)[1]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run directory for this process. The kernel lets go when the process ends, however it ends.

        Raises:
            TplaunchError: another launch holds it; says which.
        """
        # Opened for appending, not "w": the holder's name must stay readable to those who are refused.
        with self.lock_file.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = next(iter(parse_lines(file.read().encode())), {"pid": "?", "host": "?", "since": "?"})
                raise TplaunchError(
                    Problem(
                        f"another launch is using {self.root}",
                        why="process {pid} on {host} has held it since {since}".format_map(holder),
                        fix="wait for it, stop it, or train in another directory: --run-dir DIR",
                    )
                ) from None
            except OSError as error:
                # Some network file systems are mounted without locks; a run there is better than none.
                warnings.warn(f"{self.root} cannot be locked ({error}): launch only one run in it", stacklevel=3)
            file.truncate(0)
            since = datetime.now().astimezone().isoformat(timespec="seconds")
            file.write(to_line({"pid": os.getpid(), "host": os.uname().nodename, "since": since}).decode())
            file.flush()
            yield

    def is_held(self) -> bool:
        """Whether a launch holds the run directory (`lock`)."""
        try:
            with self.lock_file.open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # never held, or without locks
            return False
        return False


def runs_under(path: Path) -> list[RunDir]:
    """The run directory at a path, or those in it: runs/, or a sweep, or runs/ with sweeps in it."""
    return [RunDir(file.parent) for depth in ("", "*/", "*/*/") for file in sorted(path.glob(f"{depth}recipe.yaml"))]


def read_recipe(run: RunDir) -> Recipe | None:
    """A run's recipe; None where it is missing, or not of this version."""
    from tplaunch.recipe.load import load_recipe

    try:
        return load_recipe(run.recipe).recipe
    except TplaunchError:
        return None
