"""What torchrun starts on every rank: `python -m tplaunch.worker RUN_DIR`.

Reads RUN_DIR/recipe.yaml, trains, and exits 0 when done or stopped on request (event `done` or `stopped`), 1 on an
exception, whose account is then in `logs/attempt-K/rank-R.error.json`, beside the collectives before it in
`rank-R.flight.json`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tplaunch.launch.orphans import die_with_parent
from tplaunch.observe.flight import collectives, last_collective, remember_collectives
from tplaunch.observe.heartbeat import Beat, Heartbeat
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.schema import Recipe
from tplaunch.rundir import Record, RunDir
from tplaunch.topology import Topology

if TYPE_CHECKING:
    from tplaunch.train.trainer import Trainer


def main(run_dir: RunDir) -> None:
    """One rank, from start to end. Ends the process."""
    die_with_parent()
    attempt, rank = int(os.environ["TPLAUNCH_ATTEMPT"]), int(os.environ["RANK"])
    _redirect(run_dir.rank_log(attempt, rank))
    remember_collectives(run_dir.attempt_dir(attempt))
    run_dir.rank_error(attempt, rank).unlink(missing_ok=True)  # of the workers that torchrun starts again
    beat = Heartbeat(run_dir.beat(attempt, rank), rank)
    recipe = load_recipe(run_dir.recipe).recipe
    topology = topology_of(recipe)
    trainer: Trainer | None = None
    try:
        trainer = _set_up(recipe, topology, run_dir, beat)
        _train(trainer, run_dir, attempt)
    except BaseException as error:
        traceback.print_exc()
        _report(error, topology, beat.last, run_dir, attempt)
        if trainer is not None:
            trainer.fail()
        _exit(1)
    _exit(0)


def topology_of(recipe: Recipe) -> Topology:
    """The topology of a resolved recipe."""
    knobs = recipe.topology
    assert isinstance(knobs.dp, int)  # the launcher resolved "auto"
    return Topology(tp=knobs.tp, dp=knobs.dp, pp=knobs.pp, gpus_per_node=knobs.gpus_per_node or 0)


def _set_up(recipe: Recipe, topology: Topology, run_dir: RunDir, beat: Heartbeat) -> Trainer:
    # Here, not above: a rank whose torch is broken reports that like any other error.
    import torch.distributed as dist

    from tplaunch.launch.placement import check_placement, own_view
    from tplaunch.parallel.mesh import Mesh, init_process_group, local_device
    from tplaunch.train.stop import StopRequest
    from tplaunch.train.trainer import Trainer

    stop = StopRequest()
    device = local_device(int(os.environ["LOCAL_RANK"]))
    init_process_group(device, recipe.launch.first_step_timeout)
    views = [own_view()] * topology.world_size
    dist.all_gather_object(views, own_view())
    problems = check_placement(topology, views)
    if problems:
        raise RuntimeError("\n".join(str(problem) for problem in problems))
    return Trainer(recipe, Mesh.from_recipe(recipe, topology, device), run_dir, stop, beat)


def _train(trainer: Trainer, run_dir: RunDir, attempt: int) -> None:
    import torch.distributed as dist

    source = resume_source(run_dir.read_events(), attempt, os.environ.get("TPLAUNCH_RESUME", "auto"))
    dist.barrier()  # all have read the events that rank 0 now adds to
    if trainer.main:
        run_dir.append_event("start", attempt=attempt, world_size=trainer.mesh.topology.world_size)
    trainer.resume(source)
    trainer.run()
    dist.barrier()
    dist.destroy_process_group()


def resume_source(events: list[Record], attempt: int, asked: str) -> str:
    """What to resume from: as asked at an attempt's first start; where torchrun starts the workers again after they
    have saved, the newest checkpoint.

    Args:
        events: of the run, up to this start.
        asked: auto, none, or a checkpoint's path.
    """
    started = False
    for event in events:
        started = started or (event["event"] == "start" and event["attempt"] == attempt)
        if started and event["event"] == "checkpoint":
            return "auto"
    return asked


def _redirect(log: Path) -> None:
    """Send stdout and stderr, Python's and C++'s, to the rank's own log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _report(error: BaseException, topology: Topology, beat: Beat, run_dir: RunDir, attempt: int) -> None:
    place, record = topology.coordinates(beat.rank), collectives()
    account = {
        "rank": beat.rank,
        "tp": place.tp,
        "pp": place.pp,
        "dp": place.dp,
        "host": socket.gethostname(),
        "time": time.time(),
        "step": beat.step,
        "doing": beat.doing,
        "collective": last_collective(record),
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }
    path = run_dir.rank_error(attempt, beat.rank)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(account))
    temporary.replace(path)
    if record:
        run_dir.rank_flight(attempt, beat.rank).write_bytes(record)


def _exit(code: int) -> NoReturn:
    """End now: after a failure, waiting for threads and communicators of a broken world may hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(RunDir(Path(sys.argv[1])))
