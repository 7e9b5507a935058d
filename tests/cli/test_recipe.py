"""`tplaunch recipe` and how the program ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tplaunch import __version__
from tplaunch.cli import main as program
from tplaunch.cli.main import run
from tplaunch.errors import Exit, Problem, TplaunchError
from tplaunch.recipe.explain import editor_json_schema
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.shipped import shipped_recipes

TPLAUNCH = [sys.executable, "-c", "from tplaunch.cli.main import main; main()"]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def output(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    ended = run(["recipe", *arguments])
    out, err = capsys.readouterr()
    assert ended == code, err
    assert (err == "") == (code == 0 or "--json" in arguments), err
    return out


class TestList:
    def test_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = output(capsys, "list")
        assert "  quickstart " in out
        assert "  llama3-8b " in out
        assert re.search(r"^  llama3-8b +8.03B parameters$", out, re.M)
        assert re.search(r"^  mixtral-8x7b +46.70B parameters, 12.88B active$", out, re.M)

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        found = json.loads(output(capsys, "list", "--json"))
        assert set(found["recipes"]) == set(shipped_recipes())
        assert all(found["recipes"].values()), "every recipe says in its first sentence what it is"
        assert found["presets"]["gpt2-124m"] == 124_439_808

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("# A model of two\n# lines. And more.\nname: x\n", "A model of two lines."),
            ("# As (Doe et\n# al. 2020) has it, e.g. so.\n\n# Not this.\n", "As (Doe et al. 2020) has it, e.g. so."),
            ("name: x\n# Not this.\n", ""),
        ],
    )
    def test_a_description_is_a_whole_sentence(
        self, text: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Path("mine.yaml").write_text(text)
        monkeypatch.setattr("tplaunch.recipe.shipped.shipped_recipes", lambda: {"mine": Path("mine.yaml")})
        assert json.loads(output(capsys, "list", "--json"))["recipes"] == {"mine": said}


class TestShow:
    def test_text_is_the_recipe_with_its_origins(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = output(capsys, "show", "quickstart", "--set", "topology.tp=4")
        Path("shown.yaml").write_text(out)
        assert load_recipe("shown.yaml").recipe == load_recipe("quickstart", ["topology.tp=4"]).recipe
        lines = [line.split() for line in out.splitlines()]
        assert ["tp:", "4", "#", "--set"] in lines
        assert ["weight_decay:", "0.1", "#", "default"] in lines
        steps = next(line for line in lines if line[0] == "steps:")
        assert steps[-1].startswith(f"{shipped_recipes()['quickstart']}:")

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        shown = json.loads(output(capsys, "show", "quickstart", "--json"))
        assert shown["path"] == str(shipped_recipes()["quickstart"])
        assert shown["recipe"]["checkpoint"]["async"] is True
        assert shown["origins"]["topology.tp"].startswith(shown["path"] + ":")


class TestCheck:
    def test_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = output(capsys, "check", "quickstart")
        assert out.splitlines()[0] == "quickstart: ok"
        assert "world size     8" in out

    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        report = json.loads(
            output(
                capsys,
                "check",
                "quickstart",
                "--json",
                "--set",
                "training.micro_batch_size=2",
                "--set",
                "topology.dp=auto",
                "--gpus",
                "16",
            )
        )
        assert report["ok"]
        assert (report["world_size"], report["dp"], sum(report["stage_layers"])) == (16, 4, 4)
        assert report["microbatches"] == 2
        assert report["warnings"] == []

    def test_experts(self, capsys: pytest.CaptureFixture[str]) -> None:
        report = json.loads(output(capsys, "check", "quickstart-experts", "--json", "--set", "topology.dp=4"))
        assert (report["ep"], report["edp"], report["parameters"]) == (4, 2, 1_937_536)
        assert report["parameters"] - report["active_parameters"] == 3 * 6 * 3 * 128 * 128  # 6 of 8 in 3 layers
        assert (
            not {"ep", "edp", "expert_tp", "active_parameters"}
            & json.loads(output(capsys, "check", "quickstart", "--json")).keys()
        )

    def test_warnings(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "warning: --set: optimizer.momentum: has no effect with adamw" in output(
            capsys, "check", "quickstart", "--set", "optimizer.momentum=0.5"
        )

    def test_problems_as_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        report = json.loads(output(capsys, "check", "quickstart", "--json", "--set", "topology.tp=3", code=2))
        assert not report["ok"]
        assert {"what", "why", "fix", "where", "key"} == set(report["problems"][0])
        assert report["problems"][0]["key"] == "topology.tp"

    def test_more_ranks_than_gpus(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["recipe", "check", "quickstart", "--gpus", "4"]) == 2
        assert "8 ranks (tp 2 x pp 2 x dp 2), but there are 4 GPUs" in capsys.readouterr().err


class TestSchema:
    def test_accepts_what_ships(self, capsys: pytest.CaptureFixture[str]) -> None:
        schema = json.loads(output(capsys, "schema"))
        jsonschema.Draft202012Validator.check_schema(schema)
        for path in shipped_recipes().values():
            jsonschema.validate(yaml.safe_load(path.read_text()), schema)

    def test_covers_every_key_and_unit(self) -> None:
        schema = editor_json_schema()
        assert list(schema["properties"])[:2] == ["extends", "name"]
        assert "required" not in schema
        assert schema["$defs"]["Source"]["required"] == ["path"]
        kinds = {member["type"] for member in schema["$defs"]["Launch"]["properties"]["timeout"]["anyOf"]}
        assert kinds == {"number", "string"}


class TestNew:
    def test_writes_a_recipe_that_passes(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "tplaunch recipe check 'my run.yaml'" in output(capsys, "new", "my run.yaml")
        assert "my-run: ok" in output(capsys, "check", "my run.yaml")

    @pytest.mark.parametrize(
        ("file", "name"), [("mine.yaml", "mine"), (".x", "x"), ("---", "starter"), ("é.y", "starter")]
    )
    def test_is_named_after_its_file(self, file: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        output(capsys, "new", "--", file)
        assert load_recipe(file).recipe.name == name

    def test_overwrites_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("recipe.yaml").write_text("mine")
        assert run(["recipe", "new"]) == 2
        assert "recipe.yaml: is there already" in capsys.readouterr().err
        assert Path("recipe.yaml").read_text() == "mine"

    def test_no_such_folder(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["recipe", "new", "no/such/recipe.yaml"]) == 2
        assert "no/such/recipe.yaml: cannot be written" in capsys.readouterr().err


def _same_as_stdin(opened: Path) -> int:
    """How many descriptors of a process lead where its standard input does."""
    ends = []
    for end in opened.iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            ends.append(os.readlink(end))
    return ends.count(os.readlink(opened / "0"))


class TestEnds:
    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["--version"]) == 0
        assert capsys.readouterr().out == f"{__version__}\n"

    @pytest.mark.parametrize("arguments", [["no-such"], ["recipe", "check"], ["recipe", "check", "a", "b"], ["--what"]])
    def test_usage(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert run(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Usage" in err
        assert "Traceback" not in err

    @pytest.mark.parametrize("code", Exit)
    def test_an_error_of_ours(
        self, code: Exit, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fail_with(TplaunchError(Problem("broke", why="so", fix="mend"), "twice", code=code), monkeypatch)
        assert run(["recipe", "schema"]) == code
        assert capsys.readouterr().err == "broke\n  why: so\n  fix: mend\ntwice\n"

    def test_an_unexpected_error(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.fail_with(RuntimeError("odd"), monkeypatch)
        assert run(["recipe", "schema"]) == 1
        err = capsys.readouterr().err
        assert "internal error: RuntimeError: odd" in err
        assert "Traceback" not in err
        monkeypatch.setenv("TPLAUNCH_DEBUG", "1")
        with pytest.raises(RuntimeError, match="odd"):
            run(["recipe", "schema"])

    @staticmethod
    def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> None:
            raise error

        monkeypatch.setattr("tplaunch.recipe.explain.editor_json_schema", fail)

    def test_ctrl_c(self) -> None:
        """A real interrupt, while the program waits for a recipe from a pipe that stays silent."""
        command = [*TPLAUNCH, "recipe", "check", "/dev/stdin"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        opened = Path(f"/proc/{process.pid}/fd")
        while _same_as_stdin(opened) < 2:
            time.sleep(0.01)  # until the program has opened it
        while process.poll() is None:  # Python drops an interrupt that meets it in a destructor
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in err

    @pytest.mark.parametrize("recipe", ["pipe", "/dev/zero", "/dev/null"])
    def test_what_is_no_regular_file_is_refused_at_once(self, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
        os.mkfifo("pipe")
        assert run(["recipe", "check", recipe]) == Exit.USAGE
        assert f"{recipe}: is not a regular file" in capsys.readouterr().err

    def test_a_recipe_from_standard_input(self, tmp_path: Path) -> None:
        """Or from a shell's `<(...)`; what it names lies in the working directory."""
        (tmp_path / "base.yaml").write_text(shipped_recipes()["quickstart"].read_text())
        for words in ('echo "$0" | "$@" /dev/stdin', '"$@" <(echo "$0")'):
            line = ["bash", "-c", words, "extends: base.yaml", *TPLAUNCH, "recipe", "show"]
            done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            assert str(tmp_path / "data/shakespeare.txt") in done.stdout

    def test_a_reader_that_goes_away(self) -> None:
        process = subprocess.run(
            ["bash", "-c", '"$@" | head -c 10', "bash", *TPLAUNCH, "recipe", "schema"], capture_output=True, text=True
        )
        assert process.stderr == ""


class TestTerminal:
    def test_descriptions_are_whole_and_wrapped(self) -> None:
        """On a terminal, text goes on below itself; elsewhere a recipe is a line."""
        whole = subprocess.run([*TPLAUNCH, "recipe", "list"], capture_output=True, text=True, check=True).stdout
        line = shlex.join([*TPLAUNCH, "recipe", "list"])
        wrapped = subprocess.run(
            ["script", "-qc", f"stty cols 80; {line}", "/dev/null"], capture_output=True, text=True
        )
        assert max(map(len, wrapped.stdout.splitlines())) <= 80
        assert " ".join(wrapped.stdout.split()) == " ".join(whole.split())
        recipes, _, _ = whole.partition("\n\n")
        for line, path in zip(recipes.splitlines()[1:], shipped_recipes().values(), strict=True):
            said = line.split(maxsplit=1)[1]
            comment = " ".join(line.lstrip("# ") for line in path.read_text().split("\nname:")[0].splitlines())
            assert said.endswith(".") and comment.startswith(said)

    def test_completion(self) -> None:
        """The shell's own question, as typer's bash script asks it."""
        asked: dict[str, Any] = {
            "_TPLAUNCH_COMPLETE": "complete_bash",
            "COMP_WORDS": "tplaunch recipe ",
            "COMP_CWORD": "2",
        }
        process = subprocess.run(TPLAUNCH, env={**os.environ, **asked}, capture_output=True, text=True)
        assert process.stdout.split() == ["list", "show", "check", "schema", "new"]

    def test_help_without_colours_where_none_are_wanted(self) -> None:
        for wish in ({"NO_COLOR": "1", "FORCE_COLOR": ""}, {}):
            process = subprocess.run(
                [*TPLAUNCH, "recipe", "--help"], env={**os.environ, **wish}, capture_output=True, text=True
            )
            assert process.returncode == 0
            assert "\x1b[" not in process.stdout


def test_the_program_is_the_console_script() -> None:
    pyproject = (Path(program.__file__).parents[2] / "pyproject.toml").read_text()
    assert 'tplaunch = "tplaunch.cli.main:main"' in pyproject
