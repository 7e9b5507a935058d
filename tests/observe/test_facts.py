"""What dashboards are told of a run's surroundings, and the picture of its ranks."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.recipes import case, resolved
from tplaunch.observe.facts import machines, slurm_job, versions
from tplaunch.observe.heatmap import heat_maps
from tplaunch.observe.prediction import predictions, write_plan
from tplaunch.run.directory import RunDir
from tplaunch.spec.gpu import find_gpu
from tplaunch.spec.topology import Topology


def test_slurm_and_machines() -> None:
    assert slurm_job({}) == {}
    environ = {"SLURM_JOB_ID": "12", "SLURM_JOB_PARTITION": "gpu", "SLURM_RESTART_COUNT": "2", "OTHER": "x"}
    assert slurm_job(environ) == {"job_id": "12", "partition": "gpu", "restarts": "2"}
    assert machines(["a", "a", "b", "b"], ["H100"] * 4) == {"hosts": ["a", "b"], "devices": {"H100": 4}}
    assert {"tplaunch", "torch", "python"} <= versions().keys()


def test_a_plan_is_that_of_the_gpu_that_is_named_or_here(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    named = {**case(2), "hardware": {"gpu": "a100-80gb"}}
    write_plan(resolved(named), find_gpu("h100-80gb"), run)
    assert predictions(run)["gpu"] == "a100-80gb"
    write_plan(resolved(case(2)), find_gpu("h100-80gb"), run)
    found = predictions(run)
    assert found["gpu"] == "h100-80gb" and 0 < found["mfu"] < 1 and found["bubble"] == 0
    assert found["memory_fullest_bytes"] > found["memory_fullest_allocated_bytes"] > 0
    write_plan(resolved(case(2)), None, run)
    assert predictions(run) == {}, "a plan for another machine is not left"
    write_plan(resolved({**case(2), "hardware": {"gpu": str(tmp_path / "gone.json")}}), None, run)
    assert predictions(run) == {}
    run.plan.write_text("[1]")
    assert predictions(run) == {}


def test_small_differences_stay_pale() -> None:
    place = {"step": 1, "host": "n", "node": 0, "tp": 0, "dp": 0, "pp": 0}
    rows = [
        {**place, "rank": rank, "memory_peak_gib": 70.0, "forward_backward_s": 1.0 + rank / 100, "data_s": 0.0}
        for rank in (0, 1)
    ]
    reds = [[int(red) for red in found] for found in re.findall(r"rgb\((\d+),(\d+),(\d+)\)", heat_maps(rows))]
    assert min(green for _, green, _ in reds) > 200


def test_a_slow_node_is_the_darkest() -> None:
    topology = Topology(tp=2, dp=2, pp=2, gpus_per_node=4)
    rows = []
    for rank in range(topology.world_size):
        place = topology.place(rank)
        figures = {"memory_peak_gib": 50.0 + rank, "forward_backward_s": 1.0, "data_s": 5.0 if rank == 6 else 0.1}
        rows.append({"step": 1, "rank": rank, "host": "<n&>", "node": topology.node(rank), **place, **figures})
    page = heat_maps(rows)
    assert "<n&>" not in page
    pictures = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page)]
    assert len(pictures) == 3
    space = {"svg": "http://www.w3.org/2000/svg"}
    data = next(p for p in pictures if "data" in "".join(p.itertext()))
    colours = {}
    for group in data.iterfind("svg:g", space):
        title, cell = group.find("svg:title", space), group.find("svg:rect", space)
        assert title is not None and cell is not None
        colours[title.text] = cell.get("fill")
    assert len(colours) == 8 and len(set(colours.values())) == 2
    (hot,) = (title for title, colour in colours.items() if list(colours.values()).count(colour) == 1)
    assert hot == "rank 6: tp 0 dp 1 pp 1: 5"
    words = "".join(data.itertext())
    assert "node 0 <n&>: tp 0-1 dp 0-1 pp 0" in words and "node 1 <n&>: tp 0-1 dp 0-1 pp 1" in words
