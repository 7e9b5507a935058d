"""What `tplaunch checkpoint` says of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.recipes import case, resolved
from tplaunch.checkpoint import store
from tplaunch.cli.main import run


def written(root: Path, raw: dict[str, Any]) -> Path:
    """A checkpoint without tensors, of a recipe."""
    recipe = resolved(raw)
    about = {
        "parameters": 1000,
        "model": recipe.model.model_dump(mode="json"),
        "topology": recipe.topology.model_dump(mode="json"),
        "optimizer_state": ["exp_avg"],
    }
    (root / "step-00000001.tmp").mkdir(parents=True)
    return store.commit(root / "step-00000001.tmp", store.Manifest(1, {"progress": {"tokens": 2}}, about, {}))


def test_inspect_names_experts_where_there_are_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moe = {"experts": 4, "top_k": 2, "ffn_hidden_size": 32}
    assert (
        run(["checkpoint", "inspect", str(written(tmp_path / "experts", case(1, 1, 2, ep=2, model={"moe": moe})))]) == 0
    )
    said = capsys.readouterr().out
    assert " ep=2 expert_tp=1 " in said and " moe.experts=4 moe.top_k=2 moe.ffn_hidden_size=32 " in said
    mixture = written(tmp_path / "mixture", case(1, 1, 2, ep=2, model={"moe": moe}))
    facts = inspected(mixture, capsys)
    assert "ep=2 expert_tp=1" in facts["topology"]
    assert "moe.experts=4 moe.top_k=2 moe.ffn_hidden_size=32" in facts["model"]
    facts = inspected(written(tmp_path / "dense", case(1, 1, 2)), capsys)
    assert "dp=2" in facts["topology"] and "ep=" not in facts["topology"] and "expert" not in facts["topology"]
    assert "moe" not in facts["model"]


def inspected(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The facts that are said, by name."""
    assert run(["checkpoint", "inspect", str(checkpoint)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {name: value for name, _, value in (line.strip().partition("  ") for line in lines)}
