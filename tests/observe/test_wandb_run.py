"""What a W&B server is sent of a run: real requests of the SDK, kept by a server of the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from tests.observe.fake_wandb import KEY, Server, serving
from tests.recipes import case
from tests.world import World
from tplaunch.observe.mirror import Entry
from tplaunch.observe.wandb import WandbLog
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.events import SaveFailed
from tplaunch.spec.resolve import resolve

WANDB = {"mode": "online", "group": "ablation", "job_type": "sweep", "notes": "why: to see", "tags": ["a"]}
RECIPE = {
    **case(2, 1, 2, gpus_per_node=2, nodes=2),
    "hardware": {"gpu": "h100-80gb"},
    "logging": {"wandb": WANDB, "on_event": "notify --token hunter2hunter2"},
}

# stdin: {recipe, root, attempt, first, exit_code}; one attempt of a run, of three steps, with what can go wrong.
ATTEMPT = """
import json, sys, time
from pathlib import Path
from tplaunch.files import read_lines
from tplaunch.observe import mirror
from tplaunch.observe.prediction import write_plan
from tplaunch.observe.wandb import WandbLog
from tplaunch.recipe.schema import Recipe
from tplaunch.run.directory import RunDir
from tplaunch.run.events import Done, LossSpiked, SaveFailed, Stopped, Straggled

mirror.FIRST_S = 0.0
given = json.load(sys.stdin)
run, attempt, first = RunDir(Path(given["root"])), given["attempt"], given["first"]
recipe = Recipe.model_validate(given["recipe"])
write_plan(recipe, None, run)
run.append(SaveFailed(1, "of the attempt before"))
known = len(read_lines(run.events))
log = WandbLog(recipe, run, {"attempt": attempt, "hosts": ["n1", "n2"], "slurm": {"job_id": "7"}}, "node-0-n1")
while len(read_lines(run.events)) == known:  # until it is open
    time.sleep(0.05)
rows = [
    {"step": first, "rank": r, "host": f"n{r // 2}", "node": r // 2, "tp": r % 2, "dp": r // 2, "pp": 0,
     "memory_peak_gib": 60.0 + r, "step_time_s": 1.0, "data_s": 0.1 * r, "forward_backward_s": 0.5,
     "gradients_s": 0.1, "update_s": 0.1}
    for r in range(4)
]
for step in range(first, first + 3):
    record = {"step": step, "time": 1e9, "loss": 1 / step, "tokens": 100 * step, "attempt": attempt}
    log.log({**record, "grad_norm/layers.0": 2.0, "time/data_s": 0.1}, rows if step == first else ())
run.append(LossSpiked(first, 9.0, 2.0))
run.append(Straggled(first, 3, 1, 1, 1, 0, 2.5))
run.append(SaveFailed(first, "disk full"))
run.append(Done(first) if given["exit_code"] else Stopped(first, "SIGUSR1"))
log.finish(given["exit_code"], why="rank 3: ValueError: broken")
"""


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def attempt(root: Path, url: str, number: int, *, first: int, exit_code: int, recipe: dict[str, Any]) -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment = {**kept, "NETRC": os.devnull, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": url}
    given = {"recipe": recipe, "root": str(root), "attempt": number, "first": first, "exit_code": exit_code}
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPT], input=json.dumps(given), env=environment, text=True, timeout=120
    )
    assert done.returncode == 0


def stated(raw: dict[str, Any]) -> dict[str, Any]:
    return resolve(Recipe.model_validate(raw)).model_dump(mode="json", by_alias=True)


def test_a_run_and_its_resume(tmp_path: Path, server: Server) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    recipe = stated(RECIPE)
    attempt(run.root, server.url, 1, first=1, exit_code=1, recipe=recipe)
    attempt(run.root, server.url, 2, first=4, exit_code=0, recipe=recipe)
    sent = server.sent

    opened = [one for one in sent.runs if one.get("config") and one["groupName"]]  # others change a part
    assert len(opened) == 2
    assert len({one["name"] for one in sent.runs}) == 1, "each attempt is the same run"
    assert {(one["groupName"], one["jobType"], one["notes"]) for one in opened} == {
        ("ablation", "sweep", "why: to see")
    }
    config = json.loads(opened[-1]["config"])
    value = {key: held["value"] for key, held in config.items() if isinstance(held, dict) and "value" in held}
    assert value["topology"]["tp"] == 2 and value["slurm"] == {"job_id": "7"} and value["hosts"] == ["n1", "n2"]
    predicted, plan = value["plan"], json.loads(run.plan.read_text())
    assert predicted["step_seconds"] == plan["step_seconds"] > 0 and predicted["mfu"] == plan["mfu"]
    assert predicted["memory_fullest_bytes"] == max(rank["total"] for rank in plan["memory"])
    assert "hunter2" not in json.dumps(sent.runs) and "on_event" not in value["logging"]
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    assert (value["git"]["commit"] if git.returncode == 0 else "") == git.stdout.strip()

    rows = {line["_step"]: line for line in sent.lines("wandb-history.jsonl")}
    assert [rows[step]["train/attempt"] for step in sorted(rows)] == [1, 1, 1, 2, 2, 2]
    assert [rows[step]["train/step"] for step in sorted(rows)] == [1, 2, 3, 4, 5, 6]
    assert rows[1]["grad_norm/layers.0"] == 2.0 and rows[1]["time/data_s"] == 0.1
    assert rows[1]["plan/mfu"] == plan["mfu"] and rows[1]["plan/step_seconds"] == plan["step_seconds"]
    assert sent.exit_codes == [1, 0]

    titles = [(one["title"], one["severity"]) for one in sent.alerts]
    spike, straggler, save = ("loss spike", "WARN"), ("straggler", "WARN"), ("checkpoint failed", "ERROR")
    of_each = [spike, straggler, save]
    assert titles == [*of_each, ("run failed", "ERROR"), *of_each, ("run stopped", "WARN")]
    texts = [one["text"] for one in sent.alerts]
    assert "disk full" in texts[2] and "rank 3: ValueError: broken" in texts[3] and "SIGUSR1" in texts[-1]
    assert not any("attempt before" in text for text in texts)

    tables = [data for name, data in sent.uploads.items() if "rank/table" in name]
    pages = [data.decode() for name, data in sent.uploads.items() if "rank/heat_maps" in name]
    assert len(tables) == 2 and pages  # pages with the same figures are one file
    table = json.loads(tables[0])
    ranks = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [(row["tp"], row["dp"], row["memory_peak_gib"]) for row in ranks] == [
        (0, 0, 60.0), (1, 0, 61.0), (0, 1, 62.0), (1, 1, 63.0)
    ]  # fmt: skip
    assert "rank 3: tp 1 dp 1 pp 0: 63" in pages[0]


def train(raw: dict[str, Any], root: str, url: str) -> None:
    """A rank of a short run by the real loop, sent to a server."""
    from tests.training import batch, trainer

    os.environ |= {"NETRC": os.devnull, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": url}
    made = trainer(raw, root)
    made._batches = lambda *_: (batch(made) for _ in repeat(None))
    made.faults.at_step = lambda step: 1.0
    made.resume("none")
    made.run()


def test_system_metrics_of_every_node_go_into_one_run(world: World, tmp_path: Path, server: Server) -> None:
    raw = case(2, training={"steps": 3}, gpus_per_node=1, nodes=2)
    raw["logging"] = {"every": 1, "per_rank_every": 3, "wandb": {**WANDB, "system": "every_node"}}
    world.run(2, train, raw, str(tmp_path / "run"), server.url)
    sent = server.sent
    assert len({one["name"] for one in sent.runs}) == 1
    assert [line["train/step"] for line in sent.lines("wandb-history.jsonl")] == [1, 2, 3]
    labels = {key.split("/l:")[-1] for line in sent.lines("wandb-events.jsonl") for key in line if "/l:" in key}
    assert labels == {f"node-{node}-{os.uname().nodename}" for node in (0, 1)}
    assert sent.exit_codes == [0], "only the first node ends the run"


def test_other_nodes_are_left_alone_unless_asked(world: World, tmp_path: Path, server: Server) -> None:
    raw = case(2, training={"steps": 1}, gpus_per_node=1, nodes=2)
    world.run(2, train, {**raw, "logging": {"wandb": WANDB}}, str(tmp_path / "run"), server.url)
    assert not any("/l:" in key for line in server.sent.lines("wandb-events.jsonl") for key in line)
    assert not (tmp_path / "run/wandb/node-1").exists()


def test_alerts_do_not_wait_for_records_to_end(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create()
    heard: list[str] = []

    class Open:
        def alert(self, title: str, text: str, **_: Any) -> None:
            heard.append(title)

    quiet = {**RECIPE, "logging": {"wandb": {"mode": "disabled"}}}
    log = WandbLog(resolve(Recipe.model_validate(quiet)), run, {})
    for step in range(1, 4):
        log._entries.put(Entry({"step": step}))
    run.append(SaveFailed(1, "disk full"))
    assert log._next_entry(Open()) == Entry({"step": 1})  # type: ignore[arg-type]
    assert heard == ["checkpoint failed"]
    log._next_entry(Open())  # type: ignore[arg-type]
    assert heard == ["checkpoint failed"], "each is told once"
