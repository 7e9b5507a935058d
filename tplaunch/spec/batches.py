"""Where each step of a run begins and ends, in samples and tokens: exact, and found in the logarithm of the number of
batch sizes. Pure functions, so every rank and resume agrees."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from tplaunch.recipe.schema import BatchRampUp, Stage, Training
from tplaunch.units import Length


class Block(NamedTuple):
    """Steps of one global batch size and sequence length, in one stage.

    Args:
        step: steps before it.
        samples, tokens: that those consume.
        size: samples of each of its steps.
        seq_len: tokens of each of its samples.
        stage: number of its stage, from 0.
    """

    step: int
    samples: int
    tokens: int
    size: int
    seq_len: int
    stage: int

    def after(self, steps: int) -> tuple[int, int, int]:
        """Steps, samples and tokens after so many of its steps."""
        samples = steps * self.size
        return self.step + steps, self.samples + samples, self.tokens + samples * self.seq_len

    def until(self, place: Length) -> int:
        """How many of its steps begin before a place of the run."""
        if place.unit == "steps":
            return max(0, int(place.amount) - self.step)
        begun = self.samples if place.unit == "samples" else self.tokens
        each = self.size if place.unit == "samples" else self.size * self.seq_len
        return max(0, -((begun - int(place.amount)) // each))


class Batches:
    """The steps of a run. They are counted from 1; where the sizes end, the last goes on for ever.

    Args:
        training: says the sizes, the lengths of samples and the stages, and how long each is.

    Attributes:
        run: how long the run is, as it was said.
        ends: the step with which each size ends, but the last.
        stage_ends: the step with which each stage ends, but the last.
    """

    def __init__(self, training: Training) -> None:
        self.run = training.length
        self.blocks: list[Block] = []
        self.ends: list[int] = []
        self.stage_ends: list[int] = []
        stages = training.stages or [Stage()]
        scheduled = self._sizes(training)
        size, until = next(scheduled)
        seq_len, own, end = training.seq_len, None, None
        for number, stage in enumerate(stages):
            seq_len, own = stage.seq_len or seq_len, stage.global_batch_size or own
            end = self._end(end, stage) if number < len(stages) - 1 else None
            while own is None and until is not None:
                block = self._next(size, seq_len, number)
                count = block.until(until)
                if end is not None and block.until(end) < count:
                    break
                self._add(block, count)
                self.ends.append(self._at[0])
                size, until = next(scheduled)
            block = self._next(own or size, seq_len, number)
            self._add(block, 1 if end is None else block.until(end))
            if end is not None:
                self.stage_ends.append(self._at[0])
        self._steps = [block.step for block in self.blocks]

    _at = (0, 0, 0)  # steps, samples and tokens of the blocks so far

    def _next(self, size: int, seq_len: int, stage: int) -> Block:
        return Block(*self._at, size, seq_len, stage)

    def _add(self, block: Block, count: int) -> None:
        if count:
            self.blocks.append(block)
            self._at = block.after(count)

    def _end(self, before: Length | None, stage: Stage) -> Length:
        """Where a stage ends that begins at a place; of one that does not say it, there."""
        return self.place(stage.until) if stage.until else self._later(before, stage.last)

    def _sizes(self, training: Training) -> Iterator[tuple[int, Length | None]]:
        """Each size, and where it ends."""
        if (ramp := training.batch_ramp_up) is not None:
            yield from self._ramp(ramp, training.global_batch_size)
        end: Length | None = None
        for piece in training.batch_schedule or ():
            end = self.place(piece.until) if piece.until else self._later(end, piece.for_)
            yield piece.size, end
        yield training.global_batch_size, None

    def _ramp(self, ramp: BatchRampUp, full: int) -> Iterator[tuple[int, Length]]:
        """The sizes of a ramp: by steps, or as Megatron's, by the part of it that was consumed."""
        sizes = range(ramp.start, full, ramp.increment)
        over = Length(0) if ramp.over is None else self.place(ramp.over)
        for number, size in enumerate(sizes, 1):
            if ramp.steps is not None:
                yield size, Length(number * ramp.steps)
            else:
                yield size, Length(-(-int(over.amount) * number // len(sizes)), over.unit)

    def _later(self, place: Length | None, length: Length | None) -> Length:
        """The place so much after another; the blocks lead up to that one."""
        length = self.place(length or Length(0))
        if place is None:
            return length
        if place.unit != length.unit:
            last = self.blocks[-1] if self.blocks else None
            steps, samples, tokens = last.after(last.until(place)) if last else (0, 0, 0)
            place = Length({"steps": steps, "samples": samples}.get(length.unit, tokens), length.unit)
        return Length(place.amount + length.amount, length.unit)

    def place(self, length: Length) -> Length:
        """A part of the run, or a place in it, in steps, samples or tokens: a share is of what the run's length is said
        in, rounded up."""
        if length.unit != "%":
            return length
        numerator, denominator = length.amount.as_integer_ratio()
        return Length(-(-int(self.run.amount) * numerator // (100 * denominator)), self.run.unit)

    def _block(self, step: int) -> Block:
        return self.blocks[bisect_right(self._steps, step - 1) - 1]

    def size(self, step: int) -> int:
        """Samples of a step."""
        return self._block(step).size

    def seq_len(self, step: int) -> int:
        """Tokens of each sample of a step."""
        return self._block(step).seq_len

    def stage(self, step: int) -> int:
        """The stage of a step."""
        return self._block(step).stage

    def samples(self, step: int) -> int:
        """Samples consumed when a step has ended; after step 0 none."""
        block = self._block(max(step, 1))
        return block.after(step - block.step)[1]

    def tokens(self, step: int) -> int:
        """Tokens consumed when a step has ended; after step 0 none."""
        block = self._block(max(step, 1))
        return block.after(step - block.step)[2]

    def consumed(self, step: int, unit: str) -> int:
        """What is consumed when a step has ended: steps, samples or tokens."""
        if unit == "steps":
            return step
        return self.samples(step) if unit == "samples" else self.tokens(step)

    def reach(self, place: Length) -> int:
        """The first step that ends at or after a place of the run; 0 where that is its beginning."""
        place = self.place(place)
        key = {"steps": 0, "samples": 1}.get(place.unit, 2)
        index = bisect_right(self.blocks, place.amount - 1, key=lambda block: block[key]) - 1
        block = self.blocks[max(index, 0)]
        return block.step + block.until(place)

    def sizes(self, first: int, last: int) -> set[int]:
        """The tokens of a step that steps `first` to `last` have."""
        low = bisect_right(self._steps, first - 1) - 1
        high = bisect_right(self._steps, last - 1)
        return {block.size * block.seq_len for block in self.blocks[low:high]}
