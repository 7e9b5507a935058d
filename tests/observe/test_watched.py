"""A real run that fails, is started again and ends: one run in every reader of its records, and everything told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.observe.fake_wandb import KEY, serving
from tplaunch.run.directory import RunDir
from tplaunch.run.ranks import read_ranks

RECIPE = """
name: tiny
model: {hidden_size: 32, num_layers: 2, num_heads: 2, ffn_hidden_size: 64, vocab_size: 300}
topology: {tp: 2, dp: 1}
training: {seq_len: 16, global_batch_size: 4, steps: 8, precision: fp32, eval_every: 4}
data: {train: text.txt, validation: text.txt, tokenizer: {vocab_size: 300}}
checkpoint: {every: 2, async: false}
launch: {max_restarts: 1}
hardware: {gpu: h100-80gb}
logging: {every: 1, per_rank_every: 4, tensorboard: true, on_event: ./tell}
"""


def test_a_run_that_fails_and_goes_on(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 200)
    (tmp_path / "tell").write_text("#!/bin/sh\ncat >> told\n")
    (tmp_path / "tell").chmod(0o755)
    with serving() as server:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        environment = {
            **kept,
            "NETRC": os.devnull,
            "WANDB_API_KEY": KEY,
            "WANDB_BASE_URL": server.url,
            "CUDA_VISIBLE_DEVICES": "",
            "TPLAUNCH_CACHE": str(tmp_path / "cache"),
            "TPLAUNCH_FAULT": "rank=0,step=6,kind=exception",
        }
        line = [sys.executable, "-m", "tplaunch", "train", "tiny.yaml"]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        sent = server.sent

    run = RunDir(tmp_path / "runs/tiny")
    records = run.read_metrics()
    assert [(record["step"], record["attempt"]) for record in records] == [
        *((step, 1) for step in (1, 2, 3, 4)),
        *((step, 2) for step in (5, 6, 7, 8)),
    ]
    assert [row["step"] for row in read_ranks(run)] == [4, 4, 8, 8]
    assert records[3]["validation/perplexity"] > 1 and "checkpoint/stall_s" in records[2]
    assert records[2]["time/checkpoint_stall_s"] == records[2]["checkpoint/stall_s"]
    (planned,) = next(event for event in lines(run) if event["event"] == "data")["corpora"]
    assert records[7]["epochs"] == pytest.approx(planned["epochs"]) == pytest.approx(8 * records[0]["epochs"])

    rows = sent.lines("wandb-history.jsonl")
    assert {row["train/attempt"] for row in rows} == {1, 2}
    assert len({one["name"] for one in sent.runs}) == 1 and sent.exit_codes == [1, 0]
    assert rows[0]["plan/mfu"] == json.loads(run.plan.read_text())["mfu"]
    assert [alert["title"] for alert in sent.alerts] == ["fault", "run failed"]
    assert {"table", "html"} <= {name.split("/")[1] for name in sent.uploads if name.startswith("media/")}

    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert [event["event"] for event in told].count("attempt") == 2
    failed, ended = (event for event in told if event["event"] == "attempt_end")
    assert failed["alert"]["title"] == "run failed" and "alert" not in ended
    assert told == [{**event, "run": str(run.root), **alert(event, told)} for event in lines(run)]

    reader = accumulator.EventAccumulator(str(run.tensorboard), purge_orphaned_data=True)
    reader.Reload()
    assert [event.step for event in reader.Scalars("train/loss")] == list(range(1, 9))


def lines(run: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.events.read_text().splitlines()]


def alert(event: dict[str, Any], told: list[dict[str, Any]]) -> dict[str, Any]:
    """What was told of an event beside its line."""
    (same,) = (one for one in told if (one["event"], one["time"]) == (event["event"], event["time"]))
    return {"alert": same["alert"]} if "alert" in same else {}
