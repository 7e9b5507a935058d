"""Keys and parts of recipes in README and docs are those of the schema; links lead somewhere, pictures are shown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from tests.docs.pages import ROOT, blocks, inline_code, pages, prose
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.schema import Recipe

SECTIONS = {name for name, field in Recipe.model_fields.items() if field.annotation is not str}
_KEY = re.compile(rf"(?:{'|'.join(sorted(SECTIONS))})(?:\.[a-z_]+)+")
_FILES = {"data.json", "model.yaml"}  # these look like keys and are files
each_page = pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))


def keys() -> set[str]:
    """Every dotted key of a recipe."""
    schema = Recipe.model_json_schema()

    def below(field: dict[str, Any], prefix: str) -> set[str]:
        if "$ref" in field:
            return below(schema["$defs"][field["$ref"].rpartition("/")[2]], prefix)
        found = {f"{prefix}{name}" for name in field.get("properties", ())}
        for name, child in field.get("properties", {}).items():
            found |= below(child, f"{prefix}{name}.")
        return found.union(*(below(member, prefix) for member in field.get("anyOf", ())))

    return below(schema, "")


KEYS = keys()


def unknown(code: str) -> list[str]:
    """What looks like a key in a piece of code and is none."""
    return [key for key in _KEY.findall(code) if re.match(rf"{_KEY.pattern}(?=$|[=:, ])", code) and key not in KEYS]


@each_page
def test_keys_are_there(page: Path) -> None:
    wrong = [
        f"{page.name}:{line}: {key}" for line, code in inline_code(page) if code not in _FILES for key in unknown(code)
    ]
    assert wrong == []


def test_a_wrong_key_is_found() -> None:
    assert unknown("topology.tpp=8") == ["topology.tpp"] and unknown("launch.slurm.prtition") != []
    assert unknown("topology.tp: 8") == [] and unknown("data.bin/.idx") == []


def mistakes(text: str) -> list[str]:
    """What is wrong with a part of a recipe, in the place of its keys in one that is whole."""
    part = yaml.safe_load(text)
    part.pop("extends", None)
    whole = load_recipe("quickstart").recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    preset = (part.get("model") or {}).get("preset")
    if preset:
        whole["model"] = load_recipe("quickstart", [f"model.preset={preset}"]).recipe.model.model_dump()
        part["model"].pop("preset")
    try:
        Recipe.model_validate(_merged(whole, part))
    except ValidationError as error:
        return [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
    return []


def _merged(under: Any, over: Any) -> Any:
    if not isinstance(under, dict) or not isinstance(over, dict):
        return over
    return {**under, **{key: _merged(under.get(key), value) for key, value in over.items()}}


@each_page
def test_parts_of_recipes_are_right(page: Path) -> None:
    wrong = [
        f"{block}: {mistake}"
        for block in blocks(page)
        for text in (
            [block.text] if block.language == "yaml" else re.findall(r"<<'YAML'\n(.*?)\nYAML", block.text, re.S)
        )
        for mistake in mistakes(text)
    ]
    assert wrong == []


def test_a_wrong_part_is_found() -> None:
    assert "topology.tpp: Extra inputs are not permitted" in mistakes("topology: {tpp: 8}")
    assert mistakes("training: {precision: fp8}") and not mistakes("training: {steps: 1B}")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site and GitHub make them."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


def dead(text: str, page: Path) -> list[str]:
    """Links of a text, as it stands in a page, that lead to no file or heading of this repository."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if "://" not in target and (not file.exists() or (anchor and anchor not in anchors(file))):
            found.append(target)
    return found


@pytest.mark.parametrize("page", [*pages(), ROOT / "CONTRIBUTING.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert dead(prose(page), page) == []


def test_a_dead_link_is_found() -> None:
    text = (
        "[a](docs/runs.md#list) [b](docs/runs.md#lists) [c](docs/nothing.md) [d](#commands) ![e](https://x.org/y.png)"
    )
    assert dead(text, ROOT / "README.md") == ["docs/runs.md#lists", "docs/nothing.md"]


def test_every_picture_is_shown_and_small() -> None:
    texts = "".join(page.read_text() for page in [*pages(), ROOT / "CONTRIBUTING.md"])
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs/pictures").iterdir()}
    assert [name for name in sizes if f"pictures/{name})" not in texts] == []
    assert max(sizes.values()) < 300_000 and sum(sizes.values()) < 2_000_000
