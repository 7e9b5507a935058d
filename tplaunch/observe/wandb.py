"""Weights & Biases as a mirror of `metrics.jsonl`.

Everything that talks to W&B happens on one background thread: whatever its server does, the trainer only
ever puts a record into a queue. Measured with wandb 0.31 and a server that is away: `init` fails after its
timeout, and `finish` waits without end; here the first falls back to an offline run and the second is bounded.
"""

from __future__ import annotations

import netrc
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tplaunch.files import Tail, parse_lines, write_atomic
from tplaunch.observe.git import git_state
from tplaunch.observe.heatmap import heat_maps
from tplaunch.observe.mirror import Entry, Mirror, grouped
from tplaunch.observe.prediction import predictions
from tplaunch.recipe.schema import Recipe
from tplaunch.run.alerts import Alert, alert_of
from tplaunch.run.directory import RunDir
from tplaunch.run.events import WandbOpened, parse_event
from tplaunch.units import GiB

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT_S = 10.0
FINISH_TIMEOUT_S = 20.0
EVENTS_S = 2.0  # between looks at the run's events, for alerts
QUIET_S = 3600.0  # that W&B keeps back a further alert of the same kind

# The x-axis of each group of metrics: what is learnt goes by tokens, so that batch sizes compare; the rest by step.
_BY_TOKENS = ("train/*", "validation/*", "eval/*", "grad_norm/*", "moe/*")
_BY_STEP = ("plan/*", "throughput/*", "time/*", "memory/*", "checkpoint/*", "rank/*")


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


def wanted_mode(recipe: Recipe) -> str:
    """online, offline or disabled: what the recipe asks for, auto decided by whether there is a key."""
    mode = recipe.logging.wandb.mode
    return ("online" if has_credentials() else "offline") if mode == "auto" else mode


def init_run(
    recipe: Recipe, run_dir: RunDir, *, folder: Path, mode: str, config: dict[str, Any] | None = None, **more: Any
) -> wandb.Run:
    """Open the run's W&B run, the same one in each attempt, or raise after `INIT_TIMEOUT_S`.

    Args:
        folder: where its files go.
        mode: of W&B.
        config: of the run.
        more: further settings.
    """
    import wandb

    wanted = recipe.logging.wandb
    return wandb.init(
        mode=mode,  # type: ignore[arg-type]
        project=wanted.project,
        entity=wanted.entity,
        group=wanted.group,
        job_type=wanted.job_type,
        notes=wanted.notes,
        tags=wanted.tags,
        name=recipe.name,
        id=run_id(run_dir),
        resume="allow",
        dir=folder,
        config=config,
        settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_S, **more),
    )


def watches_every_node(recipe: Recipe) -> bool:
    """Whether the system metrics of all nodes go into the run: by W&B's shared mode, which needs its server."""
    return recipe.logging.wandb.system == "every_node" and wanted_mode(recipe) == "online"


def label_of(node: int, host: str) -> str:
    """What W&B calls the system metrics of a node."""
    return f"node-{node}-{host}"


class WandbLog(Mirror):
    """Mirrors metric records to W&B; used by one rank. No method raises or waits for a server.

    When the run is open (or cannot be) the event `wandb` {mode, id, and problem where there was one} is appended.
    Events that people should hear of (`run.alerts`) become W&B alerts.

    Args:
        recipe: the resolved recipe; its `logging.wandb` says where to, the rest becomes the run's config, except
            `launch` and `logging.on_event`, which may hold secrets.
        run_dir: an existing run directory; all files lie under its `wandb/`.
        facts: more of the config: topology, world size, parameter count, ...
        label: what this node's system metrics are called, where those of others join them.
    """

    def __init__(self, recipe: Recipe, run_dir: RunDir, facts: Mapping[str, Any], label: str = "main") -> None:
        super().__init__()
        self._recipe, self._run_dir, self._facts, self._label = recipe, run_dir, facts, label
        self._exit_code, self._why = 0, ""
        self._events = Tail(run_dir.events)
        self._events.read()  # those before this attempt
        self._mode = wanted_mode(recipe)
        if self._mode != "disabled":
            self._start("wandb")

    def finish(self, exit_code: int = 0, timeout_s: float = FINISH_TIMEOUT_S, why: str = "") -> None:
        """End the W&B run, which is shown as failed unless `exit_code` is 0.

        What is not sent within `timeout_s` stays in the run directory, for `wandb sync`.

        Args:
            why: of a failure, for its alert.
        """
        self._exit_code, self._why = exit_code, why
        self._end(timeout_s)

    def _mirror(self) -> None:
        run = self._open()
        if run is None:
            return
        planned = _planned(predictions(self._run_dir))
        try:
            while (entry := self._next_entry(run)) is not None:
                step = None if run.settings.mode == "shared" else entry.record["step"]  # there W&B counts itself
                if entry.texts:
                    _add_texts(run, entry.texts, step)
                    continue
                _add_ranks(run, entry.ranks, step)
                # Without commit=True, a row that names its step is held back until the next one comes.
                row = {**grouped(entry.record), **planned, "train/step": entry.record["step"]}
                run.log(row, step=step, commit=True)
            self._send_alerts(run)
            if self._exit_code:
                _send(run, Alert("run failed", self._why or "a rank has failed", "ERROR"))
            run.finish(exit_code=self._exit_code)
        except Exception as error:  # a mirror must never bring the trainer down
            self._run_dir.append(WandbOpened("broken", run.id, _reason(error)))

    def _next_entry(self, run: wandb.Run) -> Entry | None:
        """The next entry; meanwhile, and before each, what people should hear of is sent."""
        while True:
            self._send_alerts(run)
            with suppress(Empty):
                return self._next(EVENTS_S)

    def _send_alerts(self, run: wandb.Run) -> None:
        for line in parse_lines(self._events.read(whole_lines=True)):
            event = parse_event(line)
            if event is not None and (alert := alert_of(event)) is not None:
                _send(run, alert)

    def _open(self) -> wandb.Run | None:
        import wandb

        problem: str | None = None
        shared = {"x_label": self._label, "x_primary": True}
        first = "shared" if watches_every_node(self._recipe) else self._mode
        for mode in dict.fromkeys((first, "offline")):
            try:
                more = shared if mode == "shared" else {}
                config = self._config()
                run = init_run(self._recipe, self._run_dir, folder=self._run_dir.root, mode=mode, config=config, **more)
                define_axes(run)
            except Exception as error:  # an unreachable server, a wrong key, a full disk: train on without
                problem = _reason(error)
                wandb.teardown()  # else its service holds the id and refuses the offline run
            else:
                self._run_dir.append(WandbOpened("online" if mode == "shared" else mode, run.id, problem))
                return run
        self._run_dir.append(WandbOpened("disabled", problem=problem))
        return None

    def _config(self) -> dict[str, Any]:
        recipe = self._recipe.model_dump(mode="json", by_alias=True, exclude={"launch": True, "logging": {"on_event"}})
        plan, git = predictions(self._run_dir), git_state(Path.cwd())
        more = {"plan": plan, "git": git, **_parent(self._run_dir)}
        return {**recipe, **self._facts, **{key: value for key, value in more.items() if value}}


def _parent(run_dir: RunDir) -> dict[str, Any]:
    """Of a branch, which run it goes on from, and from which step: fields to group and filter by."""
    if (known := run_dir.history().parent) is None:
        return {}
    root = Path(known.parent)
    named = {"parent": root.name, "parent_dir": known.parent, "parent_step": known.step}
    with suppress(OSError):  # the parent has none, or is not there any more
        named["parent_wandb_id"] = (RunDir(root).wandb / "run-id").read_text().strip()
    return named


def define_axes(run: wandb.Run) -> None:
    """Say what the curves of each group go by."""
    for axis, groups in (("train/tokens", _BY_TOKENS), ("train/step", _BY_STEP)):
        run.define_metric(axis)
        for group in groups:
            run.define_metric(group, step_metric=axis)


def _planned(plan: Mapping[str, Any]) -> dict[str, float]:
    """What was predicted, as metrics: lines beside the measured ones."""
    if not plan:
        return {}
    keys = ("step_seconds", "tokens_per_s_per_gpu", "mfu", "bubble")
    return {f"plan/{key}": plan[key] for key in keys} | {
        "plan/memory_gib": plan["memory_fullest_allocated_bytes"] / GiB
    }


def _add_ranks(run: wandb.Run, ranks: Sequence[dict[str, Any]], step: int | None) -> None:
    """Add what the ranks measured, as table and heat maps, to the row that is written next."""
    if not ranks:
        return
    import wandb

    page = wandb.Html(heat_maps(ranks), inject=False)
    _add(run, {"rank/table": _table(ranks), "rank/heat_maps": page}, step, "the ranks")


def _add_texts(run: wandb.Run, texts: Sequence[dict[str, Any]], step: int | None) -> None:
    """Add what the model wrote to the row of its step: the one that is written next, or one of its own."""
    _add(run, {"samples/table": _table(texts)}, step, "samples")


def _table(rows: Sequence[dict[str, Any]]) -> wandb.Table:
    import wandb

    columns: list[str | int] = [*rows[0]]
    return wandb.Table(columns=columns, data=[[*row.values()] for row in rows])


def _add(run: wandb.Run, found: dict[str, Any], step: int | None, of: str) -> None:
    """Keep tables for the row of a step; W&B writes it when it comes to one that is committed, or to another step."""
    try:
        run.log(found, step=step, commit=False)
    except Exception as error:  # a table asks the server about artifacts, at once: the curves go on without
        print(f"W&B has no table of {of}: {_reason(error)}", file=sys.stderr, flush=True)


def _send(run: wandb.Run, alert: Alert) -> None:
    run.alert(alert.title, alert.text, level=alert.level, wait_duration=QUIET_S)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
