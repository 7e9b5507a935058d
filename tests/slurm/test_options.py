"""The section `launch.slurm` in a recipe file: sbatch's words in YAML, whatever reads it, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tplaunch.errors import RecipeError
from tplaunch.recipe.load import dump_recipe, load_recipe

REST = """
name: tiny
model: {hidden_size: 32, num_layers: 4, num_heads: 4, ffn_hidden_size: 64, vocab_size: 300}
training: {seq_len: 16, global_batch_size: 8, steps: 8}
data: {train: text.txt, tokenizer: {vocab_size: 300}}
"""


def load(folder: Path, slurm: str) -> dict:
    path = folder / "tiny.yaml"
    path.write_text(f"{REST}launch: {{slurm: {slurm}}}\n")
    return yaml.safe_load(dump_recipe(load_recipe(path).recipe))["launch"]["slurm"]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("24:00:00", "1-00:00:00"),
        ("'24:00:00'", "1-00:00:00"),
        ("4:00", "00:04:00"),
        ("90:00", "01:30:00"),
        ("1-12", "1-12:00:00"),
        ("2h", "02:00:00"),
        ("86400.0", "1-00:00:00"),  # as resolved recipes once said it
    ],
)
def test_a_time_limit_is_shown_as_slurm_shows_it(tmp_path: Path, said: str, shown: str) -> None:
    """Also to a reader that follows YAML 1.1, to whom 4:00 without quotes is the number 240."""
    assert load(tmp_path, f"{{time: {said}}}")["time"] == shown
    assert load(tmp_path, f"{{time: '{shown}'}}")["time"] == shown


@pytest.mark.parametrize("said", ["24:00:00", "4:00", "90:00"])
def test_a_time_limit_that_another_yaml_has_made_a_number_is_refused(tmp_path: Path, said: str) -> None:
    number = yaml.safe_load(said)
    assert isinstance(number, int)
    with pytest.raises(RecipeError, match=rf"launch.slurm.time: .* got {number}\n.*minutes to sbatch .* but seconds"):
        load(tmp_path, f"{{time: {number}}}")


@pytest.mark.parametrize("said", ['!!int "24:00:00"', "true", "[1, 2]", "1_440", "0x30", "~0"])
def test_no_other_scalar_slips_through(tmp_path: Path, said: str) -> None:
    with pytest.raises(RecipeError, match=r"launch.slurm.time"):
        load(tmp_path, f"{{time: {said}}}")


@pytest.mark.parametrize(("said", "shown"), [("64G", "64G"), ("64GiB", "64G"), ("1500K", "2M"), ("0", "0")])
def test_memory_is_shown_as_slurm_shows_it(tmp_path: Path, said: str, shown: str) -> None:
    assert load(tmp_path, f"{{mem: {said}}}")["mem"] == shown
    assert load(tmp_path, f"{{mem: '{shown}'}}")["mem"] == shown


def test_memory_in_a_bare_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"launch.slurm.mem: .* got 65536\n.*MiB to sbatch, but bytes .*write 65536M"):
        load(tmp_path, "{mem: 65536}")


def test_what_else_sbatch_takes_is_kept(tmp_path: Path) -> None:
    said = {"switches": 1, "exclusive": "user", "gpu_type": "h100", "sbatch": ["--wckey=x"], "licenses": "a:2"}
    kept = load(tmp_path, yaml.safe_dump(said, default_flow_style=True).strip())
    assert {key: kept[key] for key in said} == said
