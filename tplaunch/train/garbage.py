"""Python's garbage collector, told when to run."""

from __future__ import annotations

import gc
from types import TracebackType

EVERY = 100  # steps


class Garbage:
    """Within a `with` block, garbage is collected between steps, on all ranks after the same ones: else each rank
    stalls in another step, and all others wait for it (Megatron `--manual-gc`, torchtitan `gc_freq`)."""

    def __enter__(self) -> Garbage:
        gc.collect()
        gc.freeze()  # what was made for the whole run is not looked through again
        gc.disable()
        return self

    def after(self, step: int) -> None:
        """Called after each step."""
        if step % EVERY == 0:
            gc.collect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.enable()
        gc.unfreeze()
