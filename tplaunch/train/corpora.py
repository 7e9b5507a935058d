"""What a run reads of each corpus, as events: what the recipe says, when epochs begin, and what was read."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from tplaunch.data.amounts import amounts
from tplaunch.data.given import Given, Past
from tplaunch.data.mixture import Mixture
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.events import DataPlanned, DataRead, EpochBegan
from tplaunch.spec.course import Course


class CorpusLog:
    """Writes the events; on one rank.

    Args:
        recipe: its data are token files.
        run_dir: the run's directory.
        step: after which the run goes on.
        samples: that it has consumed by then.
    """

    def __init__(self, recipe: Recipe, run_dir: RunDir, step: int, samples: int) -> None:
        found = amounts(recipe)
        self.run_dir = run_dir
        self.paths = [one.path for one in found]
        # A corpus that cannot be counted is refused by those that read it.
        self.countable = all(one.samples for one in found)
        self.sizes = np.maximum(1, [one.samples or 0 for one in found])
        self.mixture = Mixture(tuple(source.weight for source in recipe.data.sources("train")))
        self.read = self.mixture.counts(samples)
        training = recipe.training
        facts = json.loads(run_dir.data_facts.read_bytes()) if run_dir.data_facts.exists() else {}
        self.past = Past.of(facts)
        self.seq_len = training.seq_len
        others = {one.sha256: one for one in self.past.given}
        # Of each corpus of now, what it gave among other ones; and those that are no more.
        now = [others.pop(one["sha256"], None) for one in facts.get("train", [])]
        self.before = np.array([one.read if one else 0 for one in now] or [0] * len(found)) // training.seq_len
        self.gone: list[Given] = [*others.values()]
        course = Course(recipe)
        at_end = samples + course.first_sample(training.steps + 1) - course.first_sample(step + 1)
        epochs = self._given(at_end) / self.sizes
        rows = zip(
            self.paths, [one.tokens for one in found], self.mixture.shares.tolist(), epochs.tolist(), strict=True
        )
        names = ("path", "tokens", "share", "epochs")
        fitted = [{"conversations": asdict(one.conversations)} if one.conversations else {} for one in found]
        planned = [dict(zip(names, row, strict=True)) | fits for row, fits in zip(rows, fitted, strict=True)]
        run_dir.append(DataPlanned(at_end, planned))

    def after(self, step: int, samples: int) -> None:
        """A step has ended; name the corpora of which it read the first sample of a further epoch.

        Args:
            samples: that the run has consumed by now.
        """
        read = self.mixture.counts(samples)
        epochs, before = (-(-counts // self.sizes) for counts in (read, self.read))
        self.read = read
        begun = np.flatnonzero((epochs > before) & (epochs > 1))
        if len(begun):
            corpora = [{"path": self.paths[c], "epoch": int(epochs[c])} for c in begun]
            self.run_dir.append(EpochBegan(step, corpora))

    def _given(self, samples: int) -> NDArray[np.int64]:
        """Samples that each corpus has given when the run has consumed so many."""
        given: NDArray[np.int64] = self.before + self.past.counts(self.mixture, samples)
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
        read = self._given(samples)
        rows = [*zip(self.paths, read.tolist(), self.mixture.shares.tolist(), self.sizes.tolist(), strict=True)]
        rows += [
            (one.path, one.read // self.seq_len, 0.0, max(1, (one.tokens - 1) // self.seq_len)) for one in self.gone
        ]
        corpora = [
            {
                "path": path,
                "samples": count,
                "share": share,
                "share_read": count / max(samples, 1),
                "epochs": count / size,
            }
            for path, count, share, size in rows
        ]
        self.run_dir.append(DataRead(step, samples, corpora))
