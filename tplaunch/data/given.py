"""What corpora gave a run before its data were changed: kept among the facts of its data, by fingerprint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tplaunch.data.mixture import Mixture


@dataclass(frozen=True)
class Given:
    """A corpus that was read.

    Attributes:
        sha256: its fingerprint (`fingerprint.corpus_facts`).
        path: that it was read from last.
        tokens: that it has.
        read: tokens that it gave, in whole samples.
    """

    sha256: str
    path: str
    tokens: int
    read: int


@dataclass(frozen=True)
class Past:
    """What a run had read when its present data began.

    Attributes:
        since: samples of the run by then.
        given: by the corpora of all data before, each once.
    """

    since: int = 0
    given: Sequence[Given] = ()

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Past:
        """From the facts of a run's data; those of a run whose data never changed need not say it."""
        return cls(facts.get("since", 0), [Given(**one) for one in facts.get("given", [])])

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return {"since": self.since, "given": [asdict(one) for one in self.given]}

    def counts(self, mixture: Mixture, samples: int) -> NDArray[np.int64]:
        """Samples of each corpus of the present data, of those that the run had consumed."""
        return mixture.counts(max(samples, self.since)) - mixture.counts(self.since)


def past_of_change(facts: Mapping[str, Any], samples: int, seq_len: int, since: int) -> Past:
    """What has been read where data, or the length of a sample, change.

    Args:
        facts: of the data before.
        samples: consumed by then.
        seq_len: their length.
        since: `samples` as the changed run counts them.
    """
    past, corpora = Past.of(facts), facts["train"]
    counts = past.counts(Mixture(tuple(float(one["weight"]) for one in corpora)), samples)
    paths = facts.get("paths", [""] * len(corpora))
    found = {one.sha256: one for one in past.given}
    for corpus, path, count in zip(corpora, paths, counts.tolist(), strict=True):
        sha256, before = corpus["sha256"], found.get(corpus["sha256"])
        found[sha256] = Given(sha256, path, corpus["tokens"], (before.read if before else 0) + count * seq_len)
    return Past(since, [*found.values()])
