"""Lines of metrics.jsonl that somebody has touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from tplaunch.run.directory import RunDir
from tplaunch.run.metrics import MetricsLog
from tplaunch.run.records import parse_records

GOOD = b'{"step": 1, "loss": 2.5, "own": "any", "grad_norm": null}\n'


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 2, "loss": "low"}',
        b'{"step": "2", "loss": 1.0}',
        b'{"step": true}',
        b'{"step": -1}',
        b'{"loss": 1.0}',
        b'{"step": 2, "time": []}',
        b'{"step": 2, "tokens_per_s": true}',
        b'{"step": 2, "lr": NaN}',
        b'{"step": 2, "loss": 1' + b"0" * 400 + b"}",
        b'{"step": 2, "validation/loss": {}}',
        b"[1, 2]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"step": 2, "lo',
    ],
)
def test_a_bad_line_is_counted_and_left_out(line: bytes) -> None:
    records, bad = parse_records(GOOD + line + b"\n\n" + GOOD)
    assert [record["step"] for record in records] == [1, 1]
    assert bad == 1


def test_a_line_that_is_being_written_is_not_bad() -> None:
    assert parse_records(GOOD + b'{"step": 2, "lo')[1] == 0
    assert parse_records(GOOD + b'{"step": 2}') == ([*parse_records(GOOD)[0], {"step": 2}], 0)


def test_a_run_goes_on_over_a_line_without_a_step(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.metrics.write_bytes(GOOD + b'{"step": "x"}\n{"step": 2}\n')
    assert run.count_bad_metrics() == 1
    MetricsLog(run).truncate_after(1)
    assert run.metrics.read_bytes() == GOOD
