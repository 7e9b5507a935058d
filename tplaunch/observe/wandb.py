"""Weights & Biases as a mirror of `metrics.jsonl`.

Everything that talks to W&B happens on one background thread: whatever its server does, the trainer only
ever puts a record into a queue. Measured with wandb 0.31 and a server that is away: `init` fails after its
timeout, and `finish` waits without end; here the first falls back to an offline run and the second is bounded.
"""

from __future__ import annotations

import netrc
import os
import threading
import uuid
from collections.abc import Mapping
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tplaunch.files import write_atomic
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.events import WandbOpened

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT_S = 10.0
FINISH_TIMEOUT_S = 20.0

_NAMES = {
    **{key: f"throughput/{key}" for key in ("tokens_per_s", "tokens_per_s_per_gpu", "step_time_s", "data_time_s")},
    **{key: f"throughput/{key}" for key in ("tflops_per_gpu", "mfu")},
    "memory_peak_gib": "memory/peak_gib",
}


def grouped(record: Mapping[str, Any]) -> dict[str, Any]:
    """A metrics record under W&B's groups: `throughput/`, `memory/`, else `train/`.

    Names that have a group already, such as `validation/loss`, keep it; `step` and `time` are W&B's own.
    """
    return {
        key if "/" in key else _NAMES.get(key, f"train/{key}"): value
        for key, value in record.items()
        if key not in ("step", "time")
    }


def has_credentials() -> bool:
    """Whether WANDB_API_KEY or a netrc file holds a key for the server that is asked for."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(server).netloc) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def run_id(run_dir: RunDir) -> str:
    """The W&B id of the run, made once and kept in `wandb/run-id`, so that a resumed run goes on as the same."""
    path = run_dir.wandb / "run-id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()


class WandbLog:
    """Mirrors metric records to W&B; used by one rank. No method raises or waits for a server.

    When the run is open (or cannot be) the event `wandb` {mode, id, and problem where there was one} is appended.

    Args:
        recipe: the resolved recipe; its `logging.wandb` says where to, the rest becomes the run's config,
            except `launch`, whose environment may hold secrets.
        run_dir: an existing run directory; all files lie under its `wandb/`.
        facts: more of the config: topology, world size, parameter count, ...
    """

    def __init__(self, recipe: Recipe, run_dir: RunDir, facts: Mapping[str, Any]) -> None:
        self._recipe, self._run_dir, self._facts = recipe, run_dir, facts
        self._records: SimpleQueue[Mapping[str, Any] | None] = SimpleQueue()
        self._exit_code = 0
        self._thread: threading.Thread | None = None
        mode = recipe.logging.wandb.mode
        if mode == "auto":
            mode = "online" if has_credentials() else "offline"
        if mode != "disabled":
            self._thread = threading.Thread(target=self._mirror, args=(mode,), name="wandb", daemon=True)
            self._thread.start()

    def log(self, record: Mapping[str, Any]) -> None:
        """Queue the record of one step; holds `step`."""
        if self._thread is not None:
            self._records.put(dict(record))

    def finish(self, exit_code: int = 0, timeout_s: float = FINISH_TIMEOUT_S) -> None:
        """End the W&B run, which is shown as failed unless `exit_code` is 0.

        What is not sent within `timeout_s` stays in the run directory, for `wandb sync`.
        """
        if self._thread is not None:
            self._exit_code = exit_code
            self._records.put(None)
            self._thread.join(timeout_s)

    def _mirror(self, mode: str) -> None:
        run = self._open(mode)
        if run is None:
            return
        try:
            while (record := self._records.get()) is not None:
                # Without commit=True, a row that names its step is held back until the next one comes.
                run.log(grouped(record), step=record["step"], commit=True)
            run.finish(exit_code=self._exit_code)
        except Exception as error:  # a mirror must never bring the trainer down
            self._run_dir.append(WandbOpened("broken", run.id, _reason(error)))

    def _open(self, mode: str) -> wandb.Run | None:
        import wandb

        wanted = self._recipe.logging.wandb
        problem: str | None = None
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                run = wandb.init(
                    mode=attempt,  # type: ignore[arg-type]
                    project=wanted.project,
                    entity=wanted.entity,
                    group=wanted.group,
                    tags=wanted.tags,
                    name=self._recipe.name,
                    id=run_id(self._run_dir),
                    resume="allow",
                    dir=self._run_dir.root,
                    config={**self._recipe.model_dump(mode="json", by_alias=True, exclude={"launch"}), **self._facts},
                    settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_S),
                )
                run.define_metric("train/tokens")
                for group in ("train/*", "validation/*"):
                    run.define_metric(group, step_metric="train/tokens")
            except Exception as error:  # an unreachable server, a wrong key, a full disk: train on without
                problem = _reason(error)
                wandb.teardown()  # else its service holds the id and refuses the offline run
            else:
                self._run_dir.append(WandbOpened(attempt, run.id, problem))
                return run
        self._run_dir.append(WandbOpened("disabled", problem=problem))
        return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
