"""Ranks beside each other, each in a process of its own: torch remembers the meshes of a world beyond its end."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tplaunch.machine import count_cores


class Run(Protocol):
    def __call__(self, function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]: ...


@contextmanager
def processes() -> Iterator[Run]:
    """Call a function with each tuple of arguments, as many at once as there are cores; results in order.

    The processes are forked from one that has imported the trainer.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tplaunch.simulate.rank"])
    with context.Pool(count_cores(), maxtasksperchild=1) as pool:

        def run(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
            return pool.imap(_Spread(function), list(jobs), chunksize=1)

        yield run


class _Spread:
    """The function of one tuple of arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        return self.function(*arguments)
