"""The generated pages say what the code says, of everything."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from tests.docs.pages import DOCS, ROOT
from tplaunch.errors import Exit
from tplaunch.huggingface.families import READ
from tplaunch.recipe.schema import Family, Recipe


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_those_of_this_code(reference: ModuleType) -> None:
    pages: dict[Path, str] = reference.pages()
    assert pages.keys() == {ROOT / "README.md", *(DOCS / "reference").glob("*.md")}
    for path, text in pages.items():
        assert path.read_text() == text, f"{path.name} is stale: python docs/reference.py"


def test_the_readme_has_a_row_for_each_family(reference: ModuleType) -> None:
    text = reference.readme((ROOT / "README.md").read_text())
    rows = [line for line in text.splitlines() if line.startswith("| ") and "| yes | yes |" in line]
    assert len(rows) == len(READ) == len(get_args(Family))
    assert reference.readme(text) == text
    for model_type, needs in (("llama", "`qkv_bias`"), ("deepseek_v3", "`latent`, `moe`"), ("mixtral", "`moe`")):
        (row,) = (line for line in rows if f"| `{model_type}` |" in line)
        assert needs in row


def test_every_key_says_what_it_is() -> None:
    schema = Recipe.model_json_schema()
    mute = [
        f"{name}.{key}"
        for name, section in {"Recipe": schema, **schema["$defs"]}.items()
        for key, field in section["properties"].items()
        if not field.get("description")
    ]
    assert not mute, "give these a Field(description=...) in recipe/schema.py"


def test_a_key_of_every_kind_is_there(reference: ModuleType) -> None:
    page = reference.recipe_page()
    assert "| `tp` | a whole number from 1 to 1,000,000 | `1` | tensor parallel: GPUs that share each layer |" in page
    assert "| `seq_len` | a whole number" in page and 'or text such as "4Mi tokens" | required |' in page
    assert "| `rope_scaling` | [a mapping](#modelrope_scaling) | `null` |" in page and "### model.rope_scaling" in page
    assert "| `async` | true or false | `true` |" in page  # by its name in YAML
    assert "### data.train[]" in page and "#### launch.slurm.container" in page


def test_a_parameter_of_every_kind_is_there(reference: ModuleType) -> None:
    page = reference.commands_page()
    assert "## tplaunch import\n" in page and "### tplaunch recipe schema\n" in page
    assert "| `RECIPE` | A recipe file, or the name of one that ships. | required |" in page
    assert "| `--max-tokens N` | Tokens to make of each. | `128`; `1<=x<=1000000` |" in page
    assert "| `--bos / --no-bos` |" in page and "| `-f, --follow` |" in page
    assert "```bash\ntplaunch tune recipes/llama3-70b.yaml --gpus 512 --write best.yaml\n```" in page


def test_exit_codes_are_those_of_the_readme() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    said = "; ".join(f"{int(code)} {code.meaning}" for code in Exit)
    assert f"Exit codes: {said}." in readme
