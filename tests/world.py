"""Small gloo worlds, made by forking one process that has imported torch and the trainer.

A case is a module-level function `f(*args)`; it runs on n fresh processes that form a world, and returns each rank's
result. Fresh, because a world leaves threads and sockets behind in its processes; forked, because importing torch
takes longer than most cases. For tests of what happens inside a world; what happens to processes is tested through
torchrun itself.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing as mp
import os
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 240


def _serve(pipe: Connection) -> None:
    """The process that is forked: must not start threads."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # to ask whether there is a GPU starts CUDA, which cannot fork
    import torch
    import torch._dynamo

    import tplaunch.train.trainer  # noqa: F401 (imported for its children)

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or each child's collector walks through all of torch, and copies its pages by doing so
    while True:
        try:
            job, world, folder = pipe.recv()
        except EOFError:
            return
        ranks = {}
        for rank in range(world):
            if (child := os.fork()) == 0:
                os._exit(_rank(rank, world, folder, *job))
            ranks[child] = rank
        while ranks:
            child, status = os.wait()
            rank = ranks.pop(child)
            if status != 0:
                if not (error := folder / f"error-{rank}").exists():
                    crash = (folder / f"crash-{rank}").read_text()
                    error.write_text(f"ended with {os.waitstatus_to_exitcode(status)}\n{crash}")
                # What its peers would say is that it has gone.
                for peer in ranks:
                    os.kill(peer, signal.SIGKILL)
        pipe.send(None)


def _rank(rank: int, world: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> int:
    import torch.distributed as dist

    from tplaunch.run.processes import die_with_parent

    die_with_parent()
    faulthandler.enable((folder / f"crash-{rank}").open("w"))
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT_S / 2)
        )
        result = pickle.dumps(function(*args))
        dist.barrier()  # a peer may still read from this one
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        return 1
    (folder / f"result-{rank}").write_bytes(result)
    return 0


class World:
    """Makes worlds. Use as a context manager."""

    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a case on `world` ranks; their results in rank order.

        Raises:
            AssertionError: a rank raised, died or did not end; holds the traceback.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self.pipe.send(((function, args), world, folder))
            if not self.pipe.poll(TIMEOUT_S):
                self.process.kill()
                raise AssertionError(f"the world did not end in {TIMEOUT_S} s")
            self.pipe.recv()
            errors = [f"{path.name}:\n{path.read_text()}" for path in sorted(folder.glob("error-*"))]
            assert not errors, "\n".join(errors)
            results = [folder / f"result-{rank}" for rank in range(world)]
            assert all(path.exists() for path in results), "a rank died"
            return [pickle.loads(path.read_bytes()) for path in results]

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        self.process.join()
