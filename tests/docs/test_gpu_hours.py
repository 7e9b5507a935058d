"""The page of GPU-hours is what its script makes of the planner as it is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_the_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("gpu_hours", DOCS / "gpu_hours.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_hours"] = module  # which its dataclasses look up
    spec.loader.exec_module(module)
    page = module.page()
    assert module.PAGE.read_text(encoding="utf-8") == page, "gpu-hours.md is stale: python docs/gpu_hours.py"
    for run in module.RUNS:
        hours = sum(stage.gpu_hours for stage in module.planned(run))
        assert f"| {hours / run.hours - 1:+.0%} |" in page, "the error as it is"
