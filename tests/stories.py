"""Histories of runs, told in a few words."""

from __future__ import annotations

from typing import Any

from tplaunch.run.events import parse_event
from tplaunch.run.history import History

_FIELDS: dict[str, dict[str, Any]] = {
    "submit": {"jobs": ["7"], "logs": [""]},
    "attempt": {"attempt": 1},
    "attempt_end": {"code": 1},
    "bad_nodes": {"nodes": ["n1"]},
}


def history(*words: str) -> History:
    """The history of these events: "start", or "checkpoint:4" for a checkpoint of step 4."""
    events = []
    for word in words:
        name, _, step = word.partition(":")
        event = parse_event(
            {"event": name, "time": 0, **_FIELDS.get(name, {}), **({"step": int(step)} if step else {})}
        )
        assert event is not None, word
        events.append(event)
    return History(events)
