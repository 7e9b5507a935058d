"""What torchrun starts on every rank: `python -m tplaunch.worker RUN_DIR`.

Reads RUN_DIR/recipe.yaml, trains, and exits 0 when done or stopped on request (event `done` or `stopped`), 1 on an
exception, whose account is then in `logs/attempt-K/rank-R.error.json`, beside the collectives before it in
`rank-R.flight.json`.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tplaunch.checkpoint.store import goes_on_after, sources
from tplaunch.data.documents import with_document_length
from tplaunch.files import write_atomic
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import LOCKED, RunDir
from tplaunch.run.flight import collectives, last_collective, remember_collectives
from tplaunch.run.heartbeat import Beat, Heartbeat
from tplaunch.run.processes import die_with_parent, ignore_profile_signal
from tplaunch.run.stopwatch import Stopwatch
from tplaunch.spec.resolve import resolve
from tplaunch.spec.run_stages import segment_after
from tplaunch.spec.topology import Topology

if TYPE_CHECKING:
    from tplaunch.train.trainer import Trainer


class Worker:
    """One rank of one attempt.

    Args:
        run_dir: the run directory, whose recipe it trains.
        attempt: the attempt's number.
        rank: its number in the world.
    """

    def __init__(self, run_dir: RunDir, attempt: int, rank: int) -> None:
        self.run_dir, self.attempt, self.rank = run_dir, attempt, rank
        self.heartbeat = Heartbeat(run_dir.beat(attempt, rank), rank)
        self.held = ExitStack()  # until this process ends
        self.stopwatch = Stopwatch()
        self.recipe: Recipe | None = None
        self.trainer: Trainer | None = None

    def run(self) -> None:
        """Train, from start to end."""
        if self.rank == 0 and os.environ.get(LOCKED) is None:  # a pasted torchrun line: no launcher holds it
            self.held.enter_context(self.run_dir.lock())
        # A run directory of an older version may hold a recipe that is not resolved.
        whole = resolve(load_recipe(self.run_dir.recipe).recipe)
        source = self.run_dir.history().resume_source(self.attempt, os.environ.get("TPLAUNCH_RESUME", "auto"))
        segment = segment_after(whole, goes_on_after(self.run_dir, source))
        self.recipe = resolve(with_document_length(segment.recipe) if whole.training.stages else segment.recipe)
        self._train(self._set_up(self.recipe, segment.stages, source), source)

    def _set_up(self, recipe: Recipe, stages: range, source: str) -> Trainer:
        # Here, not above: a rank whose torch is broken reports that like any other error. Collecting garbage during so
        # many imports takes a third of their time.
        gc.disable()
        import torch.distributed as dist

        from tplaunch.parallel.mesh import Mesh, init_process_group, local_device
        from tplaunch.parallel.placement import check_placement, own_view
        from tplaunch.torch_private import leave_out_dynamo
        from tplaunch.train.stop import StopRequest
        from tplaunch.train.trainer import Trainer

        gc.freeze()  # modules stay, and are not looked through again
        gc.enable()
        self.stopwatch.lap("imports")
        if not recipe.training.compile:
            leave_out_dynamo()
        stop = StopRequest()
        device = local_device(int(os.environ["LOCAL_RANK"]))
        init_process_group(device, recipe.launch.first_step_timeout)
        topology = Topology.of(recipe)
        views = [own_view()] * topology.world_size
        dist.all_gather_object(views, own_view())
        problems = check_placement(topology, views)
        if problems:
            raise RuntimeError("\n".join(str(problem) for problem in problems))
        mesh = Mesh.of(recipe, device)
        self.stopwatch.lap("process groups")
        # Weights that a checkpoint will overwrite are not drawn.
        draw = not sources(self.run_dir, source) and recipe.checkpoint.initial is None
        trainer = Trainer(
            recipe,
            mesh,
            self.run_dir,
            stop,
            self.heartbeat,
            stages=stages,
            draw=draw,
            stopwatch=self.stopwatch,
            attempt=self.attempt,
            export=export_saved if recipe.checkpoint.export_every else None,
        )
        self.trainer = trainer
        self.stopwatch.lap("model")
        return trainer

    def _train(self, trainer: Trainer, source: str) -> None:
        import torch.distributed as dist

        from tplaunch.run.events import Started

        dist.barrier()  # all have read the events that rank 0 now adds to
        if trainer.main:
            self.run_dir.append(Started(self.attempt, world_size=dist.get_world_size()))
        trainer.resume(source)
        self.stopwatch.lap("checkpoint")
        trainer.run()
        dist.barrier()
        dist.destroy_process_group()

    def fail(self, error: BaseException) -> None:
        """Leave an account of what ended this rank, and mark the W&B run as failed."""
        record = collectives()
        account = describe_error(error, self.heartbeat.last, self.recipe, last_collective(record))
        write_atomic(self.run_dir.rank_error(self.attempt, self.rank), json.dumps(account))
        if record:
            self.run_dir.rank_flight(self.attempt, self.rank).write_bytes(record)
        if self.trainer is not None:
            self.trainer.fail(f"rank {self.rank}: {type(error).__name__}: {error}"[:500])


def export_saved(checkpoint: Path, out: Path) -> None:
    """Make a Hugging Face folder of a checkpoint that has just been written (`checkpoint.export_every`).

    Raises:
        TplaunchError: see `tplaunch.huggingface.export.export`.
    """
    from tplaunch.checkpoint.origin import origin_of
    from tplaunch.huggingface.export import export

    origin = origin_of(checkpoint)
    export(
        checkpoint,
        out,
        precision=origin.precision,
        seq_len=origin.seq_len,
        tokenizer=origin.tokenizer,
        fresh=True,
    )


def describe_error(error: BaseException, beat: Beat, recipe: Recipe | None, collective: str) -> dict[str, Any]:
    """What a rank says of the exception that ended it.

    Args:
        recipe: None when it could not be read; then the rank's place is not known.
        collective: the last that it began.
    """
    place = Topology.of(recipe).place(beat.rank) if recipe is not None else {}
    return {
        "rank": beat.rank,
        **place,
        "host": socket.gethostname(),
        "time": time.time(),
        "step": beat.step,
        "doing": beat.part,
        "collective": collective,
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }


def main(run_dir: RunDir) -> None:
    """One rank, from start to end. Ends the process."""
    ignore_profile_signal()
    die_with_parent()
    attempt, rank = int(os.environ["TPLAUNCH_ATTEMPT"]), int(os.environ["RANK"])
    _redirect(run_dir.rank_log(attempt, rank))
    remember_collectives(run_dir.attempt_dir(attempt))
    run_dir.rank_error(attempt, rank).unlink(missing_ok=True)  # of the workers that torchrun starts again
    worker = Worker(run_dir, attempt, rank)
    try:
        worker.run()
    except BaseException as error:
        traceback.print_exc()
        worker.fail(error)
        _exit(1)
    _exit(0)


def _redirect(log: Path) -> None:
    """Send stdout and stderr, Python's and C++'s, to the rank's own log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _exit(code: int) -> NoReturn:
    """End now: after a failure, waiting for threads and communicators of a broken world may hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(RunDir(Path(sys.argv[1])))
