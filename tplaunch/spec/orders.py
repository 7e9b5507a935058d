"""The order of each pipeline rank's work in a step, for the trainer and the planner.

The orders are those of `torch.distributed.pipelining` (a test compares every action). Sources: GPipe (Huang et al.
2018, arXiv 1811.06965), 1F1B and interleaved 1F1B (Narayanan et al. 2021, arXiv 2104.04473), zero bubble and ZB-V (Qi
et al. 2023, arXiv 2401.10241), DualPipe (DeepSeek-AI 2024, arXiv 2412.19437), here its V-shaped half.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import Literal, NamedTuple

from tplaunch.spec.schedules import SCHEDULES

Kind = Literal["F", "B", "I", "W"]  # forward, whole backward, its input half, its weight half
KIND_NAMES: dict[Kind, str] = {"F": "forward", "B": "backward", "I": "input backward", "W": "weight backward"}


class Action(NamedTuple):
    """One microbatch's pass through one stage."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


def actions_of(schedule: str, rank: int, pp: int, virtual_stages: int, microbatches: int) -> list[Action]:
    """What a pipeline rank does in one step, in order.

    Raises:
        ValueError: the schedule cannot run with these numbers; the text says why.
    """
    why_not = SCHEDULES[schedule].why_not(pp, virtual_stages, microbatches)
    if why_not:
        raise ValueError(why_not)
    if schedule == "gpipe":
        return _gpipe(rank, microbatches)
    if schedule == "1f1b":
        return _one_forward_one_backward(rank, pp, microbatches)
    if schedule == "interleaved1f1b":
        return _interleaved(rank, pp, virtual_stages, microbatches, split_backward=False)
    if schedule == "interleavedzerobubble":
        return _interleaved(rank, pp, virtual_stages, microbatches, split_backward=True)
    if schedule == "zbvzerobubble":
        return _zero_bubble_v(rank, pp, microbatches)
    return _dual_pipe_v(rank, pp, microbatches)


def _gpipe(rank: int, microbatches: int) -> list[Action]:
    forwards = [Action("F", rank, m) for m in range(microbatches)]
    return forwards + [Action("B", rank, m) for m in range(microbatches)]


def _alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """`warmup` forwards, then one forward and one backward in turn, then the backwards that are left."""
    steady = [action for pair in zip(forwards[warmup:], backwards, strict=False) for action in pair]
    return forwards[:warmup] + steady + backwards[len(forwards) - warmup :]


def _one_forward_one_backward(rank: int, pp: int, microbatches: int) -> list[Action]:
    forwards = [Action("F", rank, m) for m in range(microbatches)]
    backwards = [Action("B", rank, m) for m in range(microbatches)]
    return _alternate(forwards, backwards, min(pp - 1 - rank, microbatches))


def _interleaved(rank: int, pp: int, chunks: int, microbatches: int, *, split_backward: bool) -> list[Action]:
    """Rounds of about pp microbatches; each round passes through all chunks of the rank before the next starts."""
    rounds = max(1, microbatches // pp)
    size = microbatches // rounds

    def passes(kind: Kind, order: Iterable[int]) -> list[Action]:
        chunk_order = list(order)
        return [
            Action(kind, chunk * pp + rank, round_ * size + m)
            for round_ in range(rounds)
            for chunk in chunk_order
            for m in range(size)
        ]

    forwards = passes("F", range(chunks))
    backwards = passes("I" if split_backward else "B", reversed(range(chunks)))
    hops = 1 if split_backward else 2
    warmup = min((chunks - 1) * size + hops * (pp - 1 - rank), len(forwards))
    actions = _alternate(forwards, backwards, warmup)
    return _weights_behind(actions, rank) if split_backward else actions


def _weights_behind(actions: list[Action], lag: int) -> list[Action]:
    """Put the weight half of each backward `lag` backwards after its input half (ZB-H1)."""
    result: list[Action] = []
    waiting: deque[Action] = deque()
    for action in actions:
        result.append(action)
        if action.kind == "I":
            waiting.append(action._replace(kind="W"))
            if len(waiting) > lag:
                result.append(waiting.popleft())
    return result + list(waiting)


class _Script:
    """Appends actions of the V schedules, numbering the microbatches of each stage and kind as they come."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._next: Counter[tuple[Kind, int]] = Counter()
        self._weights: deque[Action] = deque()

    def count(self, kind: Kind, stage: int) -> int:
        return self._next[kind, stage]

    def add(self, kind: Kind, stage: int) -> None:
        microbatch = self._next[kind, stage]
        self.actions.append(Action(kind, stage, microbatch))
        self._next[kind, stage] += 1
        if kind == "B":
            self._next["W", stage] += 1
        if kind == "I":
            self._weights.append(Action("W", stage, microbatch))

    def backward(self, stage: int, *, split: bool) -> None:
        """The next backward of a stage: whole, or its input half with the weight half left for later."""
        if split:
            self.add("I", stage)
            self._next["B", stage] += 1
        else:
            self.add("B", stage)
            self._next["I", stage] += 1

    def oldest_weight(self) -> None:
        if self._weights:
            action = self._weights.popleft()
            self.actions.append(action)
            self._next["W", action.stage] += 1


def _zero_bubble_v(rank: int, pp: int, microbatches: int) -> list[Action]:
    """ZB-V: each rank holds one stage on the way down and one on the way up of a V."""
    down, up = rank, 2 * pp - 1 - rank
    full = max(2 * pp - 1, microbatches)  # the order is made for a full pipeline; what is too much is dropped
    script = _Script()

    def all_of(*kinds_and_stages: tuple[Kind, int]) -> None:
        for kind, stage in kinds_and_stages:
            script.add(kind, stage)

    for _ in range(2 * (pp - rank) - 1):
        script.add("F", down)
    for _ in range(rank):
        all_of(("F", up), ("F", down))
    for _ in range(pp - rank):
        all_of(("F", up), ("I", up), ("W", up))
    while script.count("F", up) < full:
        if script.count("F", down) < full:
            script.add("F", down)
        all_of(("I", down), ("W", down), ("F", up), ("I", up), ("W", up))
    for _ in range(rank):
        all_of(("I", down), ("I", up))
    for _ in range(pp - rank):
        all_of(("I", down), ("W", down))
    for stage in (up, down):
        while script.count("W", stage) < full:
            script.add("W", stage)
    return [action for action in script.actions if action.microbatch < microbatches]


def _dual_pipe_v(rank: int, pp: int, microbatches: int) -> list[Action]:
    """DualPipeV: in the steady phase a forward of one direction meets a backward of the other."""
    down, up = rank, 2 * pp - 1 - rank
    after = pp - 1 - rank  # ranks further along the V
    script = _Script()
    for _ in range(2 * after):
        script.add("F", down)
    for _ in range(rank + 1):
        script.add("F", down)
        script.add("F", up)
    for _ in range(after):
        script.backward(up, split=True)
        script.oldest_weight()
        script.add("F", up)
    for _ in range(microbatches - 2 * pp + rank + 1):
        script.add("F", down)
        script.backward(up, split=False)
        script.add("F", up)
        script.backward(down, split=False)
    for _ in range(after):
        script.backward(up, split=False)
        script.add("F", up)
        script.backward(down, split=False)
    # From the middle of the last backwards on they are split, so that weight halves fill the drain.
    tail = [stage for _ in range(rank + 1) for stage in (up, down)]
    split_from = 2 * ((rank + 1) // 2) + (1 - rank % 2)
    for i, stage in enumerate(tail):
        script.backward(stage, split=i >= split_from)
    for _ in range(after):
        script.oldest_weight()
        script.backward(down, split=True)
    for _ in range(rank + 1):
        script.oldest_weight()
    return script.actions
