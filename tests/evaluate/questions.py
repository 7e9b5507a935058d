"""Questions and texts that tests measure, and how transformers finds a continuation."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VERBS = ["suffer", "end them", "sleep", "dream", "bear those ills", "fly to others"]


def records(count: int = 40, name: str = "query") -> list[dict[str, Any]]:
    """Questions whose choices are of unequal length, in characters and, otherwise, in bytes."""
    found = []
    for number in range(count):
        some = [VERBS[(number * step + step) % len(VERBS)] + "!" * (number % step) for step in (1, 2, 5)]
        some[number % 3] += " na\u00efvet\u00e9 \u2014 caf\u00e9" * (number % 2)
        query = f"Question {number}: to be, or not to be " + "that is the question: " * (number % 4)
        found.append({name: query, "choices": some, "answer": (number * 7 + number // 3) % 3})
    return found


def write_records(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def right_shares(rows: Sequence[dict[str, Any]], likelihoods: Sequence[Sequence[float]]) -> dict[str, float]:
    """acc, acc_norm and acc_bytes, by their definitions."""
    measures = {"acc": lambda text: 1, "acc_norm": len, "acc_bytes": lambda text: len(text.encode())}
    found = {}
    for name, length in measures.items():
        hits = 0
        for row, some in zip(rows, likelihoods, strict=True):
            best, answer = -math.inf, None
            for number, (choice, value) in enumerate(zip(row["choices"], some, strict=True)):
                if value / length(choice) > best:
                    best, answer = value / length(choice), number
            hits += answer == row["answer"]
        found[name] = hits / len(rows)
    return found
