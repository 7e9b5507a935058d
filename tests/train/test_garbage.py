"""When garbage is collected."""

from __future__ import annotations

import gc
import weakref

from tplaunch.train.garbage import EVERY, Garbage


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_garbage_waits_for_a_step_that_all_ranks_share() -> None:
    with Garbage() as garbage:
        assert not gc.isenabled()
        left = weakref.ref(Cycle())
        for step in range(1, EVERY):
            garbage.after(step)
        assert left() is not None
        garbage.after(EVERY)
        assert left() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0
