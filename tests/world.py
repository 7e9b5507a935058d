"""A pool of processes that stay up, so that many small worlds can be tried without importing torch each time.

A case is a module-level function `f(*args)`; it runs on the first n processes of the pool, in a fresh gloo world,
and returns each rank's result. For tests of what happens inside a world; what happens to processes is tested
through torchrun itself.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TIMEOUT_S = 240


def _serve(rank: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    while (job := pipe.recv()) is not None:
        function, args, world, store = job
        try:
            from datetime import timedelta

            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=TIMEOUT_S / 2),
            )
            try:
                pipe.send((function(*args), None))
            finally:
                dist.destroy_process_group()
                gc.collect()  # meshes are cycles, and each keeps the threads of its groups
        except BaseException:
            pipe.send((None, traceback.format_exc()))


class World:
    """The pool. Use as a context manager."""

    def __init__(self, size: int) -> None:
        context = mp.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a case on `world` ranks; their results in rank order.

        Raises:
            AssertionError: a rank raised, died or did not answer; holds the traceback.
        """
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            for pipe in self.pipes[:world]:
                pipe.send((function, args, world, store))
            results, failures = [], []
            for rank, pipe in enumerate(self.pipes[:world]):
                if not pipe.poll(TIMEOUT_S):
                    raise AssertionError(f"rank {rank} did not answer")
                try:
                    result, error = pipe.recv()
                except EOFError:
                    result, error = None, "the process died"
                results.append(result)
                if error is not None:
                    failures.append(f"rank {rank}:\n{error}")
        assert not failures, "\n".join(failures)
        return results

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
