"""Lines of metrics.jsonl that somebody has touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tplaunch.run.directory import RunDir
from tplaunch.run.metrics import MetricsLog
from tplaunch.run.records import parse_records, read_last

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


def test_the_last_records_are_read_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": step / 2, "pad": "x" * 300}) for step in range(1, 2001)]
    path.write_text("\n".join(lines) + "\n")
    assert read_last(path)["step"] == 2000 and read_last(path)["loss"] == 1000.0


def test_the_last_record_may_be_long_torn_or_bad(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 3.0}) + "\n" + json.dumps({"step": 2, "pad": "x" * 200_000}) + "\n")
    assert read_last(path)["step"] == 2
    path.write_text(
        json.dumps({"step": 7, "validation/loss": 3.0}) + "\n" + '{"step": 8, "loss": "x"}\n{"step": 9, "lo'
    )
    assert read_last(path) == {"step": 7, "validation/loss": 3.0}
    path.write_bytes(b"\xff\xfe" * 9000)
    assert read_last(path) == {}
    assert read_last(tmp_path / "none") == {} and read_last(tmp_path) == {}
