"""Reading recipes: extends, --set, presets, paths, origins; and writing them back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tplaunch.errors import RecipeError
from tplaunch.recipe.load import dump_recipe, load_recipe
from tplaunch.recipe.schema import Recipe
from tplaunch.recipe.shipped import shipped_recipes
from tplaunch.recipe.tree import parse

BASE = """\
name: base
model: {hidden_size: 64, num_layers: 4, num_heads: 4, ffn_hidden_size: 128, vocab_size: 512}
training:
  seq_len: 64
  global_batch_size: 8
  steps: 20
optimizer: {betas: [0.8, 0.9]}
data: {train: text.txt}
"""

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_file


def load(path: Path, *overrides: str) -> Recipe:
    return load_recipe(path, overrides).recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-1_000", -1000),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 17),
        ("1:30", "1:30"),
        ("24:00:00", "24:00:00"),
        ("2024-01-01", "2024-01-01"),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("'3e-4'", "3e-4"),
        ("!!str 5", "5"),
        ("1e", "1e"),
        ("=", "="),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    tree, problems = parse(text, "x", "/")
    assert problems == []
    assert tree is not None
    assert tree.plain() == value
    assert type(tree.plain()) is type(value)


class TestExtends:
    def test_mappings_merge_and_all_else_is_replaced(self, write: Write) -> None:
        write("base.yaml", BASE)
        child = write(
            "child.yaml", "extends: base.yaml\nname: child\ntraining: {steps: 5}\noptimizer: {betas: [0.7, 0.6]}\n"
        )
        recipe = load(child)
        assert (recipe.name, recipe.training.steps, recipe.training.seq_len) == ("child", 5, 64)
        assert recipe.optimizer.betas == [0.7, 0.6]

    def test_null_replaces_a_mapping(self, write: Write) -> None:
        write("base.yaml", BASE + "topology: {stage_layers: [4]}\nlogging: {wandb: {entity: me}}\n")
        recipe = load(write("child.yaml", "extends: base.yaml\nlogging: {wandb: {entity: null}}\n"))
        assert recipe.logging.wandb.entity is None
        assert recipe.topology.stage_layers == [4]

    def test_is_relative_to_the_file_and_goes_on(self, write: Write) -> None:
        write("a/base.yaml", BASE)
        write("b/middle.yaml", "extends: ../a/base.yaml\ntraining: {steps: 7}\n")
        assert load(write("top.yaml", "extends: b/middle.yaml\nname: top\n")).training.steps == 7

    def test_places_of_each_file(self, write: Write) -> None:
        base = write("base.yaml", BASE)
        child = write("child.yaml", "extends: base.yaml\ntraining:\n  steps: 5\n")
        origins = load_recipe(child).origins
        assert origins["training.steps"] == f"{child}:3:10"
        assert origins["training.seq_len"] == f"{base}:4:12"

    def test_problems_of_all_files_come_at_once(self, write: Write) -> None:
        base = write("base.yaml", BASE.replace("seq_len: 64", "seq_len: x").replace("name: base", "nam: base"))
        child = write("child.yaml", "extends: base.yaml\ntraining: {steps: y}\n")
        with pytest.raises(RecipeError) as caught:
            load_recipe(child)
        assert {problem.where for problem in caught.value.problems} == {
            f"{base}:1:1",
            f"{base}:4:12",
            f"{child}:2:19",
            f"{child}:1:1",
        }

    def test_a_base_without_a_recipe(self, write: Write) -> None:
        base = write("base.yaml", "# nothing\n")
        child = write("child.yaml", "extends: base.yaml\nname: a\nname: b\n")
        with pytest.raises(RecipeError) as caught:
            load_recipe(child)
        assert [problem.where for problem in caught.value.problems] == [f"{child}:3:1", str(base)]

    def test_a_cycle_over_two_files(self, write: Write) -> None:
        write("a.yaml", "extends: b.yaml\n" + BASE)
        path = write("b.yaml", "extends: a.yaml\n" + BASE)
        with pytest.raises(RecipeError, match=r"extends itself: .*b\.yaml -> .*a\.yaml -> .*b\.yaml"):
            load_recipe(path)

    def test_a_shared_base_is_no_cycle(self, write: Write) -> None:
        write("base.yaml", BASE)
        write("middle.yaml", "extends: base.yaml\n")
        assert load(write("top.yaml", "extends: ./middle.yaml\n")).name == "base"


class TestSet:
    def test_values_are_yaml_and_the_last_wins(self, write: Write) -> None:
        path = write("r.yaml", BASE)
        recipe = load(path, "training.steps=1K", "optimizer.lr=3e-4", "topology.tp=2", "topology.tp=4", "name=x")
        assert (recipe.training.steps, recipe.optimizer.lr, recipe.topology.tp, recipe.name) == (1000, 3e-4, 4, "x")

    def test_merges_mappings_and_replaces_lists(self, write: Write) -> None:
        recipe = load(write("r.yaml", BASE), "training={steps: 3}", "optimizer.betas=[0.1, 0.2]")
        assert (recipe.training.steps, recipe.training.seq_len) == (3, 64)
        assert recipe.optimizer.betas == [0.1, 0.2]

    def test_a_value_may_hold_an_equals_sign(self, write: Write) -> None:
        recipe = load(write("r.yaml", BASE), "launch.slurm.setup=['export A=b']")
        assert recipe.launch.slurm.setup == ["export A=b"]

    def test_origin(self, write: Write) -> None:
        loaded = load_recipe(write("r.yaml", BASE), ["training.steps=3", "topology={tp: 2}"])
        assert loaded.where("training.steps") == loaded.where("topology.tp") == "--set"
        assert loaded.where("training.seq_len").endswith("r.yaml:4:12")

    def test_may_give_what_the_file_lacks(self, write: Write) -> None:
        assert load(write("r.yaml", BASE.replace("name: base\n", "")), "name=given").name == "given"


class TestPreset:
    def test_fills_in_beneath_what_is_said(self, write: Write) -> None:
        model = "model: {preset: qwen3-8b, num_layers: 2}\n"
        loaded = load_recipe(write("r.yaml", model + "\n".join(BASE.splitlines()[2:]) + "\nname: p\n"))
        assert (loaded.recipe.model.num_layers, loaded.recipe.model.hidden_size) == (2, 4096)
        assert loaded.recipe.model.qk_norm
        assert loaded.where("model.num_layers").endswith("r.yaml:1:39")
        assert loaded.where("model.hidden_size") == "preset qwen3-8b"

    def test_null_takes_a_field_away(self, write: Write) -> None:
        lines = BASE.replace("{hidden_size", "{preset: llama3.1-8b, rope_scaling: null, hidden_size")
        assert load(write("r.yaml", lines)).model.rope_scaling is None
        assert load(write("r.yaml", lines.replace("rope_scaling: null,", ""))).model.rope_scaling is not None

    def test_by_set(self, write: Write) -> None:
        assert load(write("r.yaml", BASE), "model.preset=gpt2-xl").model.linear_bias


class TestPaths:
    def test_are_relative_to_the_file_that_says_them(self, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        base = write("base/base.yaml", BASE.replace("text.txt}", "text.txt, tokenizer: ../t.json}"))
        child = write("child/child.yaml", "extends: ../base/base.yaml\ndata: {validation: [{path: v.txt}]}\n")
        monkeypatch.chdir(child.parent)
        for path in (child, Path("child.yaml")):
            data = load(path, "data.validation=[{path: /abs/v.txt}, {path: w.txt}]").data
            assert data.train == str(base.parent / "text.txt")
            assert data.tokenizer == str(base.parent.parent / "t.json")
            assert [source.path for source in data.sources("validation")] == ["/abs/v.txt", str(child.parent / "w.txt")]
            assert load(path).data.sources("validation")[0].path == str(child.parent / "v.txt")

    def test_of_named_texts_and_of_tasks(self, write: Write) -> None:
        named = "{data: v.txt, code: [c.txt, {path: d.txt}], wiki: {path: w.txt, steps: 4}}"
        tasks = "eval: {tasks: [{name: q, choices: q.jsonl}, {data: u.txt, text_key: body}]}\n"
        path = write("r.yaml", BASE.replace("text.txt}", f"text.txt, validation: {named}}}") + tasks)
        recipe = load(path)
        found = [os.path.relpath(source.path, path.parent) for source in recipe.data.sources("validation")]
        assert found == ["v.txt", "c.txt", "d.txt", "w.txt"]
        assert [task.path for task in recipe.eval.tasks] == [str(path.parent / "q.jsonl"), str(path.parent / "u.txt")]
        assert [task.label for task in recipe.eval.tasks] == ["q", "u"]
        assert recipe.eval.tasks[1].text_key == "body"

    def test_home_is_expanded(self, write: Write) -> None:
        assert load(write("r.yaml", BASE), "data.train=~/t.txt").data.train == os.path.expanduser("~/t.txt")

    def test_a_gpu_is_a_path_when_it_ends_in_json(self, write: Write) -> None:
        path = write("r.yaml", BASE + "hardware: {gpu: mine.json}\n")
        assert load(path).hardware.gpu == str(path.parent / "mine.json")
        assert load(path, "hardware.gpu=h200").hardware.gpu == "h200"


class TestOrigins:
    def test_every_leaf_has_one(self, write: Write) -> None:
        loaded = load_recipe(write("r.yaml", BASE + "launch: {slurm: {env: {A: b}}}\n"), ["data.train=[{path: x}]"])
        values = loaded.recipe.model_dump(by_alias=True)

        def leaves(value: Any, key: str) -> list[str]:
            if isinstance(value, dict) and value:
                return [
                    leaf for name, child in value.items() for leaf in leaves(child, f"{key}.{name}" if key else name)
                ]
            return [key]

        assert set(leaves(values, "")) <= set(loaded.origins)
        assert loaded.origins["data.train[0].path"] == "--set"
        assert loaded.origins["checkpoint.async"] == loaded.origins["launch.slurm.time"] == "default"
        assert loaded.where("checkpoint.async") == ""


class TestDump:
    @pytest.mark.parametrize("preset", ["llama3.1-8b", "qwen3-0.6b", "gpt2-xl"])
    def test_presets_load_back_equal(self, preset: str, write: Write) -> None:
        recipe = load(
            write(
                "r.yaml",
                BASE.replace(
                    "{hidden_size: 64, num_layers: 4, num_heads: 4, ffn_hidden_size: 128, vocab_size: 512}",
                    f"{{preset: {preset}}}",
                ),
            )
        )
        assert load(write("again.yaml", dump_recipe(recipe))) == recipe

    @pytest.mark.parametrize("name", shipped_recipes())
    def test_shipped_recipes_load_back_equal(self, name: str, write: Write) -> None:
        recipe = load(Path(name))
        assert load(write("again.yaml", dump_recipe(recipe))) == recipe

    @settings(max_examples=25)
    @given(
        text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
        | st.sampled_from(
            ["1e5", "3e-4", "yes", "null", "0x1f", "<<", "=", "1_0", "a: b", "- a", "&a", "\ufeff", "\x85"]
        ),
        number=st.floats(min_value=1e-300, allow_infinity=False),
    )
    def test_any_text_and_number_load_back_equal(
        self, text: str, number: float, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        path = tmp_path_factory.mktemp("dump") / "r.yaml"
        path.write_text(BASE)
        recipe = load(path)
        slurm = recipe.launch.slurm.model_copy(
            update={"setup": [text], "env": {"".join(filter(str.isprintable, text)): text}, "partition": text}
        )
        recipe = recipe.model_copy(
            update={
                "launch": recipe.launch.model_copy(update={"slurm": slurm}),
                "optimizer": recipe.optimizer.model_copy(update={"lr": number}),
            }
        )
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load(path) == recipe


class TestShipped:
    @pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "recipes/quickstart.yaml", "recipes/quickstart"])
    def test_is_found_by_name_from_anywhere(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        loaded = load_recipe(name)
        assert loaded.recipe.name == "quickstart"
        assert loaded.path == shipped_recipes()["quickstart"]
        assert Path(loaded.recipe.data.sources("train")[0].path).is_file()

    def test_a_file_of_that_name_wins(self, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(write("quickstart", BASE).parent)
        assert load(Path("quickstart")).name == "base"


def test_a_sequence_may_be_of_16_million_tokens() -> None:
    loaded = load_recipe("quickstart", ["training.seq_len=16777216"])
    assert loaded.recipe.training.seq_len == 2**24
    with pytest.raises(RecipeError, match="from 1 to 16,777,216"):
        load_recipe("quickstart", ["training.seq_len=16777217"])
