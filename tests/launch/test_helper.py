"""How `bench` and `generate` start their module and read its answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tplaunch.check.recipe import check_recipe
from tplaunch.errors import Exit, TplaunchError
from tplaunch.launch.helper import run_module
from tplaunch.recipe.load import load_recipe

MODULE = """
import json, os, sys
from pathlib import Path
request = json.loads((Path(sys.argv[1]) / "request.json").read_text())
if request.get("fail"):
    raise SystemExit("it cannot be done")
if os.environ["RANK"] == "0":
    (Path(sys.argv[1]) / "result.json").write_text(json.dumps({"twice": 2 * request["number"]}))
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "doubling.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return "doubling"


def test_an_answer_comes_back_and_a_failure_is_one(module: str, capfd: pytest.CaptureFixture[str]) -> None:
    checked = check_recipe(load_recipe("quickstart", ["topology={tp: 2, pp: 1, dp: 1}"]), need_data=False)
    assert run_module(module, checked, {"number": 21}, task="the sum") == {"twice": 42}
    with pytest.raises(TplaunchError, match="the sum failed") as caught:
        run_module(module, checked, {"fail": True}, task="the sum")
    assert caught.value.code == Exit.FAILED, "not USAGE, which says that nothing was started"
    assert "it cannot be done" in capfd.readouterr().err
