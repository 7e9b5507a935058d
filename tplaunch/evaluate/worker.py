"""What torchrun starts on every rank of an evaluation: `python -m tplaunch.evaluate.worker FOLDER` (`launch.helper`).

Rank 0 answers with what `tplaunch.evaluate.score` gives of each row.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tplaunch.data.indexed import IndexedTokens
from tplaunch.evaluate.rows import Given, Rows, Windows
from tplaunch.evaluate.score import score
from tplaunch.generate.load import load_model
from tplaunch.parallel.mesh import Mesh
from tplaunch.parallel.rank import helper_rank


@dataclass(frozen=True)
class Request:
    """What is asked for: rows, or the windows of a corpus.

    Args:
        checkpoint: its directory.
        progress: a file that gets a byte for each row that is done.
        rows: see `Given`.
        corpus: prefix of a .bin/.idx pair.
        window, documents: see `Windows`.
        ema: by the averaged weights.
    """

    checkpoint: str
    progress: str
    rows: list[tuple[list[int], int]] | None = None
    corpus: str = ""
    window: int = 0
    documents: bool = False
    ema: bool = False


def main(folder: str) -> None:
    """One rank, from start to end."""
    with helper_rank(folder) as rank:
        request = Request(**rank.request)
        rows: Rows
        if request.rows is not None:
            rows = Given(request.rows)
        else:
            rows = Windows(IndexedTokens.open(request.corpus), request.window, documents=request.documents)
        model = load_model(rank.recipe, Mesh.of(rank.recipe, rank.device), Path(request.checkpoint), ema=request.ema)
        progress = os.open(request.progress, os.O_WRONLY | os.O_APPEND)
        rank.answer(score(model, rows, lambda count: os.write(progress, b"." * count)))


if __name__ == "__main__":
    main(sys.argv[1])
