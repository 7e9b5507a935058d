"""Real W&B runs, offline and against servers that are away, die or are stand-ins; read back from their files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.observe.fake_wandb import KEY, Server, serving
from tplaunch.files import read_lines
from tplaunch.observe.mirror import grouped
from tplaunch.observe.wandb import has_credentials, run_id
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Branched

STEPS = 20

RECIPE = {
    "name": "tiny",
    "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_hidden_size": 128, "vocab_size": 512},
    "topology": {"tp": 2, "dp": 1},
    "training": {"seq_len": 32, "global_batch_size": 4, "steps": STEPS},
    "data": {"train": "corpus"},
    "launch": {"slurm": {"env": {"SECRET_TOKEN": "hunter2hunter2"}}},
}

# argv: run directory, W&B mode, first step, finish timeout; a line on stdin starts the second half.
TRAINER = f"""
import json, sys, time
from pathlib import Path
from tplaunch.observe import wandb
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir

wandb.INIT_TIMEOUT_S = 3.0
recipe = json.loads({json.dumps(json.dumps(RECIPE))})
recipe["logging"] = {{"wandb": {{"mode": sys.argv[2], "tags": ["a"], "group": "g"}}}}
first, waited = int(sys.argv[3]), 0.0
start = time.perf_counter()
log = wandb.WandbLog(Recipe.model_validate(recipe), RunDir(Path(sys.argv[1])), {{"world_size": 2, "parameters": 12345}})
waited += time.perf_counter() - start
for step in range(first, first + {STEPS}):
    if step == first + {STEPS} // 2:
        sys.stdin.readline()
    start = time.perf_counter()
    log.log({{"step": step, "time": 1e9, "loss": 1 / step, "tokens": step * 128, "tokens_per_s": 1e3,
             "memory_peak_gib": 0.5, "validation/loss": 2 / step}})
    waited += time.perf_counter() - start
log.finish(timeout_s=float(sys.argv[4]))
print(waited)
"""


def environment(**wanted: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return {**kept, "NETRC": os.devnull, **wanted}


def start(run: RunDir, mode: str, first: int = 1, finish_s: float = 60.0, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(run.root), mode, str(first), str(finish_s)],
        env=environment(**env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def end(trainer: subprocess.Popen[str]) -> float:
    """Lets the trainer go on to its end; the seconds that W&B has made it wait before `finish`."""
    out, _ = trainer.communicate("\n", timeout=120)
    assert trainer.returncode == 0
    return float(out)


def read_back(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of a run's .wandb file by type."""
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(directory)]
    out = subprocess.run(inspect, env=environment(), capture_output=True, text=True, timeout=60, check=True).stdout
    by_type: dict[str, list[dict[str, Any]]] = {}
    for line in map(json.loads, out.splitlines()):
        by_type.setdefault(line["type"], []).append(line[line["type"]])
    return by_type


def rows(records: dict[str, list[dict[str, Any]]]) -> dict[int, dict[str, Any]]:
    return {r["step"]["num"]: r["item"] for r in records["history"]}


def wandb_event(run: RunDir) -> dict[str, Any]:
    return next(e for e in reversed(read_lines(run.events)) if e["event"] == "wandb")


def files_holding(root: Path, text: str) -> list[Path]:
    return [p for p in root.rglob("*") if p.is_file() and text.encode() in p.read_bytes()]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def test_groups() -> None:
    record = {"step": 3, "time": 1.0, "loss": 2.0, "lr": 0.1, "mfu": 0.4, "step_time_s": 1.5, "memory_peak_gib": 7.0}
    assert grouped({**record, "validation/loss": 2.5, "checkpoint/stall_s": 0.1}) == {
        "train/loss": 2.0,
        "train/lr": 0.1,
        "throughput/mfu": 0.4,
        "throughput/step_time_s": 1.5,
        "memory/peak_gib": 7.0,
        "validation/loss": 2.5,
        "checkpoint/stall_s": 0.1,
    }


def test_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    assert not has_credentials()
    netrc.write_text("machine elsewhere.org login user password x\n")
    assert not has_credentials()
    netrc.write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert has_credentials()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org:8443")
    assert not has_credentials()
    netrc.write_text("not a netrc file")
    assert not has_credentials()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert has_credentials()


def test_the_config_of_a_branch_says_its_parent(run: RunDir, tmp_path: Path) -> None:
    trunk = RunDir(tmp_path / "trunk")
    run.append(Branched(40, str(trunk.root), str(trunk.checkpoints / "step-00000040")))
    end(start(run, "auto"))
    (first,) = run.wandb.glob("offline-run-*")
    ((opened,), known) = read_back(first)["run"], {"parent", "parent_dir", "parent_step"}
    config = opened["config"]["update"]
    assert (config["parent"], config["parent_dir"], config["parent_step"]) == ("trunk", str(trunk.root), 40)
    assert {key for key in config if key.startswith("parent")} == known
    trunks = run_id(trunk)
    end(start(run, "auto", first=STEPS + 1))
    *_, second = sorted(run.wandb.glob("offline-run-*"))
    assert read_back(second)["run"][0]["config"]["update"]["parent_wandb_id"] == trunks


def test_offline_without_a_key_and_one_id_after_a_resume(run: RunDir) -> None:
    end(start(run, "auto"))
    (first,) = run.wandb.glob("offline-run-*")
    records = read_back(first)
    assert rows(records).keys() == set(range(1, STEPS + 1))
    row = rows(records)[4]
    assert row["train/loss"] == 1 / 4 and row["validation/loss"] == 2 / 4 and row["train/tokens"] == 512
    assert row["throughput/tokens_per_s"] == 1e3 and row["memory/peak_gib"] == 0.5
    (opened,) = records["run"]
    config = opened["config"]["update"]
    assert config["model"]["hidden_size"] == 64 and config["topology"]["tp"] == 2
    assert config["world_size"] == 2 and config["parameters"] == 12345
    assert opened["project"] == "tplaunch" and opened["display_name"] == "tiny" and opened["tags"] == ["a"]
    axes = {m["glob_name"]: m["step_metric"] for m in records["metric"] if m.get("glob_name")}
    assert axes["train/*"] == axes["validation/*"] == "train/tokens" and axes["throughput/*"] == "train/step"
    assert [exit["exit_code"] for exit in records["exit"]] == [0]
    assert files_holding(run.root, "hunter2hunter2") == []

    end(start(run, "auto", first=11))
    (second,) = set(run.wandb.glob("offline-run-*")) - {first}
    resumed = read_back(second)
    assert rows(resumed).keys() == set(range(11, STEPS + 11))
    assert resumed["run"][0]["run_id"] == opened["run_id"] == run_id(run)
    assert [e["mode"] for e in read_lines(run.events)] == ["offline", "offline"]


def test_texts_are_a_table_in_the_row_of_their_step(run: RunDir) -> None:
    """Step 2 has no record of its own, step 4 has one."""
    script = f"""
import json, sys
from pathlib import Path
from tplaunch.observe.wandb import WandbLog
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir

log = WandbLog(Recipe.model_validate(json.loads({json.dumps(json.dumps(RECIPE))})), RunDir(Path(sys.argv[1])), {{}})
for step in range(1, 6):
    if step % 2 == 0:
        log.log_texts([{{"step": step, "prompt": "to be", "text": f" or not {{step}}"}}])
    if step != 2:
        log.log({{"step": step, "time": 1e9, "loss": 1 / step, "tokens": step}})
log.finish(timeout_s=60.0)
"""
    subprocess.run([sys.executable, "-c", script, str(run.root)], env=environment(), timeout=120, check=True)
    (folder,) = run.wandb.glob("offline-run-*")
    found = rows(read_back(folder))
    assert [step for step in sorted(found) if any("samples/table" in key for key in found[step])] == [2, 4]
    assert [step for step in sorted(found) if "train/loss" in found[step]] == [1, 3, 4, 5]
    tables = [json.loads(path.read_text()) for path in folder.rglob("*.table.json")]
    assert sorted(table["data"] for table in tables) == [[[2, "to be", " or not 2"]], [[4, "to be", " or not 4"]]]


def test_online(run: RunDir, server: Server) -> None:
    end(start(run, "auto", WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url))
    assert [line["train/loss"] for line in server.sent.lines("wandb-history.jsonl")] == [
        1 / step for step in range(1, STEPS + 1)
    ]
    assert server.sent.exit_codes == [0]
    assert wandb_event(run)["mode"] == "online"
    (directory,) = run.wandb.glob("run-*-*")
    assert rows(read_back(directory)).keys() == set(range(1, STEPS + 1))
    assert files_holding(run.root, KEY) == []


@pytest.mark.slow
def test_an_unreachable_server_costs_nothing(run: RunDir) -> None:
    began = time.monotonic()
    waited = end(start(run, "online", WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9"))
    assert waited < 2.0
    assert time.monotonic() - began < 60
    assert wandb_event(run)["mode"] == "offline"
    assert "127.0.0.1:9" in wandb_event(run)["problem"]
    (directory,) = run.wandb.glob("offline-run-*")
    assert rows(read_back(directory)).keys() == set(range(1, STEPS + 1))
    assert files_holding(run.root, KEY) == []


def test_a_server_that_dies_in_mid_run_costs_nothing(run: RunDir, server: Server) -> None:
    trainer = start(run, "online", finish_s=3.0, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    deadline = time.monotonic() + 60
    while not read_lines(run.events):
        assert time.monotonic() < deadline, "no run was opened"
        time.sleep(0.1)
    server.shutdown()
    server.server_close()
    assert end(trainer) < 10
    (directory,) = run.wandb.glob("run-*-*")
    assert rows(read_back(directory)).keys() == set(range(1, STEPS + 1))


def test_a_key_that_is_none(run: RunDir) -> None:
    end(start(run, "online", WANDB_API_KEY="short"))
    assert wandb_event(run)["mode"] == "offline"
    assert wandb_event(run)["problem"]
    (directory,) = run.wandb.glob("offline-run-*")
    assert len(rows(read_back(directory))) == STEPS


def test_disabled_writes_nothing(run: RunDir) -> None:
    end(start(run, "disabled"))
    assert list(run.wandb.iterdir()) == []
    assert read_lines(run.events) == []


def test_the_recipe_of_these_tests_is_one() -> None:
    Recipe.model_validate(RECIPE)
