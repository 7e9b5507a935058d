"""What a run reads of each corpus, as events: what the recipe says, when epochs begin, and what was read."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from tplaunch.data.amounts import amounts
from tplaunch.data.given import Given, Past
from tplaunch.data.reading import Reading
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.events import DataPlanned, DataRead, EpochBegan
from tplaunch.spec.course import Course


class CorpusLog:
    """Writes the events; on one rank.

    Args:
        recipe: its data are token files.
        reading: what it reads.
        run_dir: the run's directory.
        step: after which the run goes on.
        samples: that it has consumed by then.
    """

    def __init__(self, recipe: Recipe, reading: Reading, run_dir: RunDir, step: int, samples: int) -> None:
        found = amounts(recipe)
        self.reading, self.run_dir = reading, run_dir
        self.shares = [one.share for one in found]
        # A corpus that cannot be counted is refused by those that read it.
        self.countable = all(one.samples for one in found)
        packs = recipe.data.packs
        units = [
            one.samples if packs else ((one.tokens or 1) - 1) // unit
            for one, unit in zip(found, reading.units, strict=True)
        ]
        self.sizes = np.array([max(1, one or 0) for one in units]) * np.array(reading.units)  # tokens of an epoch
        self.read = reading.tokens(samples)
        facts = json.loads(run_dir.data_facts.read_bytes()) if run_dir.data_facts.exists() else {}
        past = Past.of(facts)
        self.since, self.by_then = past.since, reading.tokens(past.since)
        others = {one.sha256: one for one in past.given}
        # Of each corpus of now, what it gave among other ones; and those that are no more.
        now = [others.pop(one["sha256"], None) for one in facts.get("train", [])] if others else []
        self.before = np.array([one.read if one else 0 for one in now] or [0] * len(found))
        self.gone: list[Given] = [*others.values()]
        self.seq_len = recipe.training.seq_len
        course = Course(recipe)
        at_end = samples + course.first_sample(recipe.training.steps + 1) - course.first_sample(step + 1)
        epochs = (self._given(at_end) / self.sizes).tolist()
        planned = [
            {
                "path": one.path,
                "tokens": one.tokens,
                "share": one.share,
                "epochs": often,
                **({"conversations": asdict(one.conversations)} if one.conversations else {}),
            }
            for one, often in zip(found, epochs, strict=True)
        ]
        run_dir.append(DataPlanned(at_end, planned))

    def after(self, step: int, samples: int) -> None:
        """A step has ended; name the corpora of which it read the first sample of a further epoch.

        Args:
            samples: that the run has consumed by now.
        """
        read = self.reading.tokens(samples)
        epochs, before = (-(-tokens // self.sizes) for tokens in (read, self.read))
        self.read = read
        begun = np.flatnonzero((epochs > before) & (epochs > 1))
        if len(begun):
            corpora = [{"path": self.reading.paths[c], "epoch": int(epochs[c])} for c in begun]
            self.run_dir.append(EpochBegan(step, corpora))

    def _given(self, samples: int) -> NDArray[np.int64]:
        """Tokens that each corpus has given when the run has consumed so many samples."""
        given: NDArray[np.int64] = self.before + self.reading.tokens(max(samples, self.since)) - self.by_then
        return given

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the data were read by now, for a metrics record.

        Returns:
            `epochs`, of all corpora together, and of several `epochs_most`, of the one that is read most often; {}
            where a corpus cannot be counted.
        """
        if not self.countable:
            return {}
        read = self._given(samples)
        found = {"epochs": float(read.sum() / self.sizes.sum())}
        return found if len(read) == 1 else {**found, "epochs_most": float((read / self.sizes).max())}

    def close(self, step: int, samples: int) -> None:
        """The launch ends: what was read so far, beside what the weights ask for."""
        rows = [*zip(self.reading.paths, self._given(samples).tolist(), self.shares, self.sizes.tolist(), strict=True)]
        seq_len = self.seq_len
        rows += [(one.path, one.read, 0.0, max(1, (one.tokens - 1) // seq_len) * seq_len) for one in self.gone]
        total = max(sum(tokens for _, tokens, _, _ in rows), 1)
        corpora = [
            {
                "path": path,
                "tokens": tokens,
                "samples": tokens // seq_len,
                "share": share,
                "share_read": tokens / total,
                "epochs": tokens / size,
            }
            for path, tokens, share, size in rows
        ]
        self.run_dir.append(DataRead(step, samples, corpora))
