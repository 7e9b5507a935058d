"""Documents begin with begin-of-sequence when the tokenizer's texts do, or when it is asked for; a mismatch is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import processors

from tplaunch.cli.main import run
from tplaunch.data import build as building
from tplaunch.data import text
from tplaunch.data.build import build
from tplaunch.data.corpus import Meta, meta_path, tokenizer_path
from tplaunch.data.indexed import IndexedTokens
from tplaunch.data.prepare import prepare_recipe_data
from tplaunch.data.tokenizer import END_OF_DOCUMENT, Tokenizer, train_bpe
from tplaunch.errors import Exit, RecipeError, TplaunchError
from tplaunch.recipe.schema import Recipe

DOCUMENTS = ["To be, or not to be.", "", "that is the question", "x" * 70]
BYTES = processors.ByteLevel(trim_offsets=False)


def template(single: str, *names: str) -> Any:
    return processors.TemplateProcessing(
        single=single, pair=None, special_tokens=[(name, 257 + ("<s>", "</s>").index(name)) for name in names]
    )


POST_PROCESSORS = {
    "none": (None, []),
    "bytes": (BYTES, []),
    "template": (template("<s> $A", "<s>"), [257]),
    "sequence": (processors.Sequence([BYTES, template("<s> $A", "<s>")]), [257]),
    "two": (template("<s> <s> $A </s>", "<s>", "</s>"), [257, 257]),
    "end only": (template("$A </s>", "</s>"), []),
    "roberta": (processors.RobertaProcessing(("</s>", 258), ("<s>", 257)), [257]),
}


def tokenizer(folder: Path, kind: str = "template") -> Path:
    path = folder / "tokenizer.json"
    train_bpe(DOCUMENTS, 257, path)
    made = Library.from_file(str(path))
    made.add_special_tokens(["<s>", "</s>"])
    if POST_PROCESSORS[kind][0] is not None:
        made.post_processor = POST_PROCESSORS[kind][0]
    made.save(str(path))
    return path


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


def read(prefix: Path) -> list[list[int]]:
    corpus = IndexedTokens.open(prefix)
    return [corpus.document(number).tolist() for number in range(len(corpus))]


def expected(codec: Tokenizer, begin: list[int]) -> list[list[int]]:
    return [[*begin, *codec.encode(text).tolist(), codec.eod] for text in DOCUMENTS if text]


@pytest.mark.parametrize("kind", POST_PROCESSORS)
def test_documents_begin_as_the_tokenizer_begins_texts(tmp_path: Path, documents: Path, kind: str) -> None:
    path, begin = tokenizer(tmp_path, kind), POST_PROCESSORS[kind][1]
    codec = Tokenizer(path)
    assert list(codec.begin) == begin
    assert codec.encode_prompt("To be") == Library.from_file(str(path)).encode("To be").ids
    meta = build([documents], tmp_path / "c", path)
    assert read(tmp_path / "c") == expected(codec, begin)
    assert list(meta.bos) == begin and Meta.read(tmp_path / "c") == meta


@pytest.mark.parametrize("kind", POST_PROCESSORS)
@pytest.mark.parametrize("bos", [True, False])
def test_it_can_be_asked_for(tmp_path: Path, documents: Path, kind: str, bos: bool) -> None:
    path, begin = tokenizer(tmp_path, kind), POST_PROCESSORS[kind][1]
    if kind == "roberta" and not bos:
        with pytest.raises(TplaunchError, match="cannot be made to leave out"):
            build([documents], tmp_path / "c", path, bos=bos)
        return
    build([documents], tmp_path / "c", path, bos=bos)
    begin = (begin or [257]) if bos else []
    assert read(tmp_path / "c") == expected(Tokenizer(path), begin)
    kept = Tokenizer(tokenizer_path(tmp_path / "c"))  # the model that is trained with it is given texts alike
    assert list(kept.begin) == begin
    assert kept.encode_prompt("To be")[: len(begin)] == begin


def test_the_token_is_the_one_that_is_named_else_the_one_that_ends(tmp_path: Path, documents: Path) -> None:
    path = tokenizer(tmp_path, "none")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "</s>"}}')
    assert build([documents], tmp_path / "named", path, bos=True).bos == (258,)
    assert build([documents], tmp_path / "own", 257, bos=True).bos == (0,)
    own = Tokenizer(tokenizer_path(tmp_path / "own"))
    assert own.decode(own.begin, skip_special_tokens=False) == END_OF_DOCUMENT


def test_a_document_of_many_blocks_begins_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a preparation goes on in the middle of it."""
    monkeypatch.setattr(text, "BLOCK", 50)
    monkeypatch.setattr(building, "_SYNC_EVERY", 1)
    path, play = tokenizer(tmp_path), tmp_path / "play.txt"
    play.write_text("To be or not to be, " * 40)
    (tmp_path / "more.txt").write_text("that is the question")
    codec = Tokenizer(path)
    begin = [257]
    documents = [[*begin, *codec.encode(t).tolist(), codec.eod] for t in (play.read_text(), "that is the question")]
    whole = building.encode_all

    def torn(*args: Any) -> Any:
        for number, encoded in enumerate(whole(*args)):
            if number == 5:
                raise KeyboardInterrupt
            yield encoded

    monkeypatch.setattr(building, "encode_all", torn)
    with pytest.raises(KeyboardInterrupt):
        build([play, tmp_path / "more.txt"], tmp_path / "c", path)
    monkeypatch.setattr(building, "encode_all", whole)
    build([play, tmp_path / "more.txt"], tmp_path / "c", path)
    assert read(tmp_path / "c") == documents


def recipe(train: str, tokenizer: Path | None) -> Recipe:
    model = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "ffn_hidden_size": 8, "vocab_size": 300}
    training = {"seq_len": 8, "global_batch_size": 1, "steps": 1}
    data = {"train": train, "tokenizer": str(tokenizer) if tokenizer else None}
    return Recipe.model_validate({"name": "t", "model": model, "training": training, "data": data})


def test_a_mismatch_is_refused_before_the_start(tmp_path: Path, documents: Path) -> None:
    path = tokenizer(tmp_path)
    build([documents], tmp_path / "c", path)
    build([documents], tmp_path / "without", path, bos=False)
    cache = tmp_path / "cache"
    prepare_recipe_data(recipe(str(tmp_path / "c"), path), cache)
    with pytest.raises(
        RecipeError, match=r"(?s)do not begin.*no token of their own, its texts with token 257"
    ) as error:
        prepare_recipe_data(recipe(str(tmp_path / "without"), path), cache)
    assert f"{tokenizer_path(tmp_path / 'without')}" in str(error.value) and "--bos" in str(error.value)
    for tokens in (None, tokenizer_path(tmp_path / "without")):  # with its own it goes
        prepare_recipe_data(recipe(str(tmp_path / "without"), tokens), cache)
    # A corpus of an earlier version, which never began documents.
    meta = json.loads(meta_path(tmp_path / "without").read_text())
    del meta["bos"]
    meta["tokenizer"] = Tokenizer(path).fingerprint
    meta_path(tmp_path / "without").write_text(json.dumps(meta))
    with pytest.raises(RecipeError, match="prepare it again with --bos"):
        prepare_recipe_data(recipe(str(tmp_path / "without"), path), cache)


def test_raw_text_of_a_recipe_begins_too(tmp_path: Path, documents: Path) -> None:
    path = tokenizer(tmp_path)
    ready = prepare_recipe_data(recipe(str(documents), path), tmp_path / "cache")
    assert isinstance(ready.data.train, str)
    assert read(Path(ready.data.train)) == expected(Tokenizer(path), [257])


@pytest.mark.parametrize(("more", "bos"), [([], [257]), (["--bos"], [257]), (["--no-bos"], [])])
def test_the_command(
    tmp_path: Path, documents: Path, capsys: pytest.CaptureFixture[str], more: list[str], bos: list[int]
) -> None:
    arguments = ["data", "prepare", str(documents), "-o", str(tmp_path / "c"), "--tokenizer", str(tokenizer(tmp_path))]
    assert run([*arguments, *more, "--json"]) == Exit.DONE
    assert json.loads(capsys.readouterr().out)["bos"] == bos
