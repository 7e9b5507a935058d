"""Raw text to corpora: once, whole or not at all, resumed, and refused when it does not fit the recipe."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tplaunch.data import build as building
from tplaunch.data import encode, text
from tplaunch.data.build import build
from tplaunch.data.corpus import Meta, meta_path, tokenizer_path, verify_corpus
from tplaunch.data.indexed import IndexedTokens, bin_path, idx_path
from tplaunch.data.prepare import prepare_recipe_data
from tplaunch.data.progress import Progress
from tplaunch.data.tokenizer import Tokenizer, train_bpe
from tplaunch.errors import RecipeError, TplaunchError
from tplaunch.recipe.schema import Recipe

DATA = Path(__file__).parents[2] / "recipes" / "data"
PLAY = (DATA / "shakespeare-validation.txt").read_text()
SPEECHES = PLAY.split("\n\n")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe([PLAY], 512, path)
    return path


@pytest.fixture
def speeches(tmp_path: Path) -> Path:
    path = tmp_path / "speeches.jsonl"
    path.write_text("".join(json.dumps({"text": speech}) + "\n" for speech in SPEECHES))
    return path


def corpus_bytes(prefix: Path) -> dict[str, bytes]:
    """The files of a corpus; there must be no others that start with its name."""
    files = sorted(prefix.parent.glob(f"{prefix.name}.*"))
    assert files == [bin_path(prefix), idx_path(prefix), meta_path(prefix), tokenizer_path(prefix)]
    return {path.name.removeprefix(prefix.name): path.read_bytes() for path in files}


# Building


def test_documents_tokens_and_ends(tmp_path: Path, speeches: Path, tokenizer: Path) -> None:
    play = tmp_path / "play.txt"
    play.write_text(PLAY)
    meta = build([play, speeches], tmp_path / "out" / "c", tokenizer)
    codec = Tokenizer(tokenizer)
    corpus = IndexedTokens.open(tmp_path / "out" / "c")
    corpus.verify()
    documents = [PLAY, *filter(None, SPEECHES)]
    assert len(corpus) == len(documents) == meta.documents
    assert meta.tokens == len(corpus.tokens)
    for number, document in enumerate(documents):
        tokens = corpus.document(number)
        assert tokens[-1] == codec.eod
        assert codec.decode(tokens[:-1]) == document
    assert meta == Meta.read(tmp_path / "out" / "c")
    assert [source.name for source in meta.sources] == ["play.txt", "speeches.jsonl"]
    assert meta.tokenizer == Tokenizer(tokenizer_path(tmp_path / "out" / "c")).fingerprint == codec.fingerprint


def test_empty_documents_are_left_out(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": "x"}\n\n{"text": ""}\n')
    assert build([path], tmp_path / "c", tokenizer).documents == 1
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(TplaunchError, match=r"no text in .*empty\.txt"):
        build([tmp_path / "empty.txt"], tmp_path / "e", tokenizer)
    assert not idx_path(tmp_path / "e").exists()


def test_a_trained_tokenizer_lies_beside_its_data(tmp_path: Path, speeches: Path) -> None:
    meta = build([speeches], tmp_path / "c", 300)
    assert meta.vocab_size == Tokenizer(tokenizer_path(tmp_path / "c")).vocab_size == 300


def test_what_exists_is_not_overwritten(tmp_path: Path, speeches: Path, tokenizer: Path) -> None:
    build([speeches], tmp_path / "c", tokenizer)
    before = corpus_bytes(tmp_path / "c")
    with pytest.raises(TplaunchError, match="exists already"):
        build([speeches], tmp_path / "c", 300)
    assert corpus_bytes(tmp_path / "c") == before


def test_all_bad_inputs_are_named_at_once(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(TplaunchError) as error:
        build([tmp_path / "a.csv", tmp_path / "b.txt"], tmp_path / "c", tokenizer)
    assert [problem.what for problem in error.value.problems] == [
        f"{tmp_path}/a.csv: unknown kind of text",
        f"{tmp_path}/b.txt: no such file",
    ]


def test_threads_write_the_same_as_one(
    tmp_path: Path, speeches: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "BLOCK", 20_000)
    for name, threads in (("one", 1), ("many", 5)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, threads=threads: range(threads))
        build([speeches], tmp_path / name, tokenizer)
    assert corpus_bytes(tmp_path / "one") == corpus_bytes(tmp_path / "many")


def test_an_error_in_a_thread_is_the_users_message(
    tmp_path: Path, speeches: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "BLOCK", 20_000)
    with speeches.open("a") as file:
        file.write("{broken\n")
    with pytest.raises(TplaunchError, match=rf"speeches\.jsonl:{len(SPEECHES) + 1}: not JSON"):
        build([speeches], tmp_path / "c", tokenizer)


# Interruption


class Interrupted(Exception):
    pass


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK", 4000)
    monkeypatch.setattr(building, "_SYNC_EVERY", 4)


def counting(monkeypatch: pytest.MonkeyPatch, stop_after: int | None) -> list[int]:
    """Count the blocks that are tokenized, and stop after some."""
    seen: list[int] = []
    whole = encode.encode_all

    def counted(*args: Any) -> Iterator[encode.Encoded]:
        for encoded in islice(whole(*args), stop_after):
            seen.append(encoded.read)
            yield encoded
        if stop_after is not None:
            raise Interrupted

    monkeypatch.setattr(building, "encode_all", counted)
    return seen


def build_interrupted(
    monkeypatch: pytest.MonkeyPatch, stop_after: int, path: Path, prefix: Path, tokenizer: Path
) -> None:
    """A build that ends after some blocks."""
    with monkeypatch.context() as patch:
        counting(patch, stop_after)
        with pytest.raises(Interrupted):
            build([path], prefix, tokenizer)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("stop_after", [0, 3, 4, 17])
def test_an_interrupted_build_goes_on(
    tmp_path: Path, speeches: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stop_after: int
) -> None:
    path = speeches
    if kind == "txt":
        path = tmp_path / "play.txt"
        path.write_text(PLAY)
    build([path], tmp_path / "whole", tokenizer)
    prefix = tmp_path / "parts"
    build_interrupted(monkeypatch, stop_after, path, prefix, tokenizer)
    assert not idx_path(prefix).exists()
    assert not bin_path(prefix).exists()
    total = len(list(text.blocks(path, "text")))
    again = counting(monkeypatch, None)
    build([path], prefix, tokenizer)
    assert len(again) == total - stop_after // 4 * 4
    assert corpus_bytes(prefix) == corpus_bytes(tmp_path / "whole")


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("change", ["input", "tokenizer"])
def test_a_changed_task_starts_anew(
    tmp_path: Path, speeches: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    build_interrupted(monkeypatch, 9, speeches, tmp_path / "c", tokenizer)
    if change == "input":
        speeches.write_text(speeches.read_text().replace("Brutus", "Antony"))
    else:
        train_bpe([PLAY], 400, tmp_path / "other.json")
        tokenizer = tmp_path / "other.json"
    build([speeches], tmp_path / "c", tokenizer)
    build([speeches], tmp_path / "fresh", tokenizer)
    assert corpus_bytes(tmp_path / "c") == corpus_bytes(tmp_path / "fresh")


KILLED = """
import os, signal, sys
from pathlib import Path
from tplaunch.data import build, text
text.BLOCK, build._SYNC_EVERY = 4000, 4
encode_all = build.encode_all
def killed(*args):
    for number, encoded in enumerate(encode_all(*args)):
        if number == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        yield encoded
build.encode_all = killed
build.build([Path(sys.argv[1])], Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.usefixtures("small_blocks")
def test_a_killed_build_goes_on(tmp_path: Path, speeches: Path, tokenizer: Path) -> None:
    prefix = tmp_path / "c"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(speeches), str(prefix), str(tokenizer)])
    assert killed.returncode == -signal.SIGKILL
    assert not idx_path(prefix).exists()
    build([speeches], prefix, tokenizer)
    build([speeches], tmp_path / "whole", tokenizer)
    assert corpus_bytes(prefix) == corpus_bytes(tmp_path / "whole")


def test_one_tokenizer_does_for_all_cores(
    tmp_path: Path, speeches: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a vocabulary of 128,000 each takes hundreds of megabytes; so no other process has one either."""
    made: list[str] = []
    load = Tokenizer._load

    def counted(self: Tokenizer, content: bytes, *args: Any) -> None:
        made.append("one")
        load(self, content, *args)

    monkeypatch.setattr(Tokenizer, "_load", counted)
    many = tmp_path / "many.jsonl"
    many.write_text(speeches.read_text() * (6_000_000 // speeches.stat().st_size))
    whole = building.encode_all
    before = multiprocessing.active_children()
    others: list[Any] = []

    def watched(*args: Any) -> Iterator[encode.Encoded]:
        for encoded in whole(*args):
            others.extend(child for child in multiprocessing.active_children() if child not in before)
            yield encoded

    monkeypatch.setattr(building, "encode_all", watched)
    build([many], tmp_path / "c", tokenizer)
    assert made == ["one"]
    assert not others


def test_ctrl_c_ends_it_soon_and_spoils_nothing(tmp_path: Path, tokenizer: Path) -> None:
    many = tmp_path / "many.txt"
    many.write_text(PLAY * (200_000_000 // len(PLAY)))
    command = [sys.executable, "-m", "tplaunch", "data", "prepare", str(many), "--tokenizer", str(tokenizer)]
    process = subprocess.Popen([*command, "-o", str(tmp_path / "c")], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    while not list(tmp_path.glob("c.bin.tmp")):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert "Traceback" not in process.stderr.read()
    assert not idx_path(tmp_path / "c").exists()
    many.write_text(PLAY)
    build([many], tmp_path / "c", tokenizer)
    build([many], tmp_path / "whole", tokenizer)
    assert corpus_bytes(tmp_path / "c") == corpus_bytes(tmp_path / "whole")


def test_what_was_synced_must_be_there(
    tmp_path: Path, speeches: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    build_interrupted(monkeypatch, 9, speeches, tmp_path / "c", tokenizer)
    (tmp_path / "c.bin.tmp").write_bytes(b"")
    with pytest.raises(TplaunchError, match=r"c\.bin\.tmp is shorter than it was"):
        build([speeches], tmp_path / "c", tokenizer)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("last", ["bin", "idx"])
def test_a_build_interrupted_at_its_last_step_starts_anew(
    tmp_path: Path, speeches: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    build([speeches], tmp_path / "whole", tokenizer)
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if target.name == f"c.{last}":
            raise Interrupted
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(Interrupted):
            build([speeches], tmp_path / "c", tokenizer)
    assert not idx_path(tmp_path / "c").exists()
    build([speeches], tmp_path / "c", tokenizer)
    assert corpus_bytes(tmp_path / "c") == corpus_bytes(tmp_path / "whole")


# Damage


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("small")
    (folder / "a.jsonl").write_text('{"text": "Friends, Romans"}\n{"text": "countrymen"}\n{"text": "lend me"}\n')
    build([folder / "a.jsonl"], folder / "c", tokenizer)
    return folder / "c"


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_damage_of_a_corpus_is_refused(
    tmp_path_factory: pytest.TempPathFactory, small: Path, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    for path in (bin_path(small), idx_path(small), meta_path(small)):
        (folder / path.name).write_bytes(path.read_bytes())
    victim = data.draw(st.sampled_from([bin_path(folder / "c"), idx_path(folder / "c")]))
    content = bytearray(victim.read_bytes())
    damage = data.draw(st.sampled_from(["flip", "truncate", "append", "remove"]))
    place = data.draw(st.integers(0, len(content) - 1))
    if damage == "flip":
        content[place] ^= data.draw(st.integers(1, 255))
    elif damage == "truncate":
        del content[place:]
    elif damage == "append":
        content += bytes(data.draw(st.integers(1, 20)))
    victim.write_bytes(content)
    if damage == "remove":
        victim.unlink()
    with pytest.raises(TplaunchError, match=victim.name.replace(".", r"\.")):
        verify_corpus(folder / "c", Progress(False))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 2}', "\0"])
def test_a_damaged_description_is_refused(tmp_path: Path, small: Path, content: str) -> None:
    for path in (bin_path(small), idx_path(small)):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    meta_path(tmp_path / "c").write_text(content)
    with pytest.raises(TplaunchError, match=r"c\.meta\.json: does not describe a corpus"):
        verify_corpus(tmp_path / "c", Progress(False))


# Recipes


def recipe(data: dict[str, Any], vocab_size: int = 512, seq_len: int = 64) -> Recipe:
    model = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_hidden_size": 128, "vocab_size": vocab_size}
    training = {"seq_len": seq_len, "global_batch_size": 8, "steps": 10}
    return Recipe.model_validate({"name": "test", "model": model, "training": training, "data": data})


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "play.txt").write_text(PLAY[:60_000])
    (tmp_path / "validation.txt").write_text(PLAY[60_000:80_000])
    return {
        "train": str(tmp_path / "play.txt"),
        "validation": str(tmp_path / "validation.txt"),
        "tokenizer": {"vocab_size": 512},
    }


def problems(data: dict[str, Any], cache: Path, **sizes: int) -> list[tuple[str, str]]:
    with pytest.raises(RecipeError) as error:
        prepare_recipe_data(recipe(data, **sizes), cache)
    return [(problem.key, str(problem)) for problem in error.value.problems]


def state(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_raw_text_is_prepared_on_first_use_only(tmp_path: Path, raw: dict[str, Any]) -> None:
    cache = tmp_path / "cache"
    first = prepare_recipe_data(recipe(raw), cache)
    assert isinstance(first.data.train, str)
    assert isinstance(first.data.tokenizer, str)
    assert Path(first.data.train).is_relative_to(cache)
    tokens = IndexedTokens.open(first.data.train).tokens
    assert Tokenizer(first.data.tokenizer).decode(tokens) == PLAY[:60_000]
    made = state(cache)
    assert not [path for path in made if path.suffix in (".tmp", ".lock")]
    assert prepare_recipe_data(recipe(raw), cache) == first
    assert state(cache) == made
    # What came out is a recipe, too, and is already prepared.
    assert prepare_recipe_data(first, tmp_path / "other") == first


def test_other_text_is_prepared_again(tmp_path: Path, raw: dict[str, Any]) -> None:
    first = prepare_recipe_data(recipe(raw), tmp_path / "cache")
    (tmp_path / "validation.txt").write_text(PLAY[60_000:80_001])
    second = prepare_recipe_data(recipe(raw), tmp_path / "cache")
    assert second.data.train == first.data.train
    assert second.data.tokenizer == first.data.tokenizer
    assert second.data.validation != first.data.validation


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPLAUNCH_CACHE", str(tmp_path / "elsewhere"))
    assert Path(str(prepare_recipe_data(recipe(raw)).data.train)).is_relative_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TPLAUNCH_CACHE", str(tmp_path / "file" / "x"))
    with pytest.raises(TplaunchError, match="fix: set TPLAUNCH_CACHE"):
        prepare_recipe_data(recipe(raw))


PREPARE = """
import sys
from pathlib import Path
from tplaunch.data.prepare import prepare_recipe_data
from tplaunch.recipe.schema import Recipe
sys.stdin.readline()
recipe = prepare_recipe_data(Recipe.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
for path in sorted(Path(sys.argv[2]).glob("[ct]*/*")):
    print(path, path.stat().st_ino, path.stat().st_mtime_ns)
"""


def test_launches_at_one_time_prepare_once(tmp_path: Path, raw: dict[str, Any]) -> None:
    """Two processes begin together; neither replaces what the other has made."""
    arguments = [sys.executable, "-c", PREPARE, recipe(raw).model_dump_json(by_alias=True), str(tmp_path / "cache")]
    pipe = subprocess.PIPE
    launches = [subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for launch in launches:
        assert launch.stdin
        launch.stdin.write("go\n")
        launch.stdin.flush()
    outputs = [launch.communicate()[0] for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0]
    assert len(outputs[0].splitlines()) == 9  # two corpora of four files, and the tokenizer
    assert len(set(outputs)) == 1


def test_a_blend_of_raw_and_prepared(tmp_path: Path, raw: dict[str, Any], speeches: Path, tokenizer: Path) -> None:
    build([speeches], tmp_path / "c", tokenizer)
    blend = [{"path": raw["train"], "weight": 3.0}, {"path": str(tmp_path / "c")}]
    made = prepare_recipe_data(recipe({"train": blend, "tokenizer": str(tokenizer)}), tmp_path / "cache")
    sources = made.data.sources("train")
    assert [source.weight for source in sources] == [3.0, 1.0]
    assert sources[1].path == str(tmp_path / "c")
    assert len(IndexedTokens.open(sources[0].path).tokens) > 1000
    assert made.data.validation is None


def test_the_tokenizer_beside_prepared_data_is_used(tmp_path: Path, speeches: Path, tokenizer: Path) -> None:
    build([speeches], tmp_path / "c", tokenizer)
    made = prepare_recipe_data(recipe({"train": str(tmp_path / "c")}), tmp_path / "cache")
    assert made.data.tokenizer == str(tokenizer_path(tmp_path / "c"))
    tokenizer_path(tmp_path / "c").unlink()
    assert prepare_recipe_data(recipe({"train": str(tmp_path / "c")}), tmp_path / "cache").data.tokenizer is None


def test_missing_sources_are_named_by_their_keys(tmp_path: Path) -> None:
    blend = [{"path": str(tmp_path / "no.txt")}, {"path": str(tmp_path / "none")}]
    found = problems({"train": blend, "validation": str(tmp_path / "v"), "tokenizer": {"vocab_size": 300}}, tmp_path)
    assert [key for key, _ in found] == [
        "data.train[0].path",
        *["data.train[1].path"] * 2,  # the .bin and the .idx
        *["data.validation"] * 2,
    ]
    assert f"{tmp_path}/no.txt: no such file" in found[0][1]


Change = Callable[[dict[str, Any], Path], object]


@pytest.mark.parametrize(
    ("change", "sizes", "key", "said"),
    [
        (lambda d, t: d.update(tokenizer=None), {}, "data.tokenizer", "is needed to read raw text"),
        (lambda d, t: d.update(tokenizer=str(t / "no.json")), {}, "data.tokenizer", "cannot read the tokenizer"),
        (lambda d, t: d.update(tokenizer=d["train"]), {}, "data.tokenizer", "not a tokenizer.json"),
        (lambda d, t: None, {"vocab_size": 511}, "model.vocab_size", "the tokenizer has 512 tokens"),
        (lambda d, t: (t / "validation.txt").write_text("short"), {}, "data.validation", "less than one sample"),
        (
            lambda d, t: (t / "play.txt").write_bytes(b"\xff" * 99),
            {},
            "data.train",
            "play.txt: byte 0: data.train: not UTF-8",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, raw: dict[str, Any], change: Change, sizes: dict[str, int], key: str, said: str
) -> None:
    change(raw, tmp_path)
    found = problems(raw, tmp_path / "cache", **sizes)
    assert [one for one, _ in found] == [key]
    assert said in found[0][1]


def test_a_tokenizer_of_other_data_is_refused(tmp_path: Path, speeches: Path, tokenizer: Path) -> None:
    build([speeches], tmp_path / "c", 300)
    found = problems({"train": str(tmp_path / "c"), "tokenizer": str(tokenizer)}, tmp_path / "cache")
    assert found[0][0] == "data.train"
    assert "was made with another tokenizer" in found[0][1]


def test_a_token_beyond_the_model_is_refused_with_its_place(tmp_path: Path, speeches: Path, tokenizer: Path) -> None:
    build([speeches], tmp_path / "c", tokenizer)
    tokenizer_path(tmp_path / "c").unlink()  # as of another maker
    meta_path(tmp_path / "c").unlink()
    first = int(np.argmax(IndexedTokens.open(tmp_path / "c").tokens >= 400))
    found = problems({"train": str(tmp_path / "c")}, tmp_path / "cache", vocab_size=400)
    assert found[0][0] == "data.train"
    assert f"c.bin: byte {2 * first}: " in found[0][1]
    assert "is outside the vocabulary of 400" in found[0][1]


def test_prepared_data_cannot_train_a_tokenizer(tmp_path: Path, speeches: Path, tokenizer: Path) -> None:
    build([speeches], tmp_path / "c", tokenizer)
    found = problems({"train": str(tmp_path / "c"), "tokenizer": {"vocab_size": 300}}, tmp_path / "cache")
    assert found[0][0] == "data.tokenizer"
    assert "no raw training text" in found[0][1]


def test_documents_end_with_the_token_that_a_recipe_names(tmp_path: Path, raw: dict[str, Any]) -> None:
    tokenizer = tmp_path / "published.json"
    train_bpe([PLAY], 500, tokenizer)
    content = json.loads(tokenizer.read_text().replace("<|endoftext|>", "<start>"))
    content["added_tokens"].append({**content["added_tokens"][0], "id": 500, "content": "<fin>"})
    tokenizer.write_text(json.dumps(content))
    found = problems({**raw, "tokenizer": str(tokenizer)}, tmp_path / "cache")
    assert found[0][0] == "data.tokenizer" and "no end-of-document token" in found[0][1]
    made = prepare_recipe_data(recipe({**raw, "tokenizer": str(tokenizer), "eod": "<fin>"}), tmp_path / "cache")
    (train,) = made.data.sources("train")
    assert Meta.read(Path(train.path)).eod == IndexedTokens.open(train.path).tokens[-1] == 500  # type: ignore[union-attr]
    assert Tokenizer(tokenizer_path(Path(train.path))).eod == 500


def test_a_list_of_names_and_a_folder_are_corpora(tmp_path: Path, raw: dict[str, Any]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "b.txt").write_text(PLAY[:5000])
    (folder / "a.txt").write_text(PLAY[5000:9000])
    data = {**raw, "train": [raw["train"], str(folder), {"path": str(folder / "*.txt"), "weight": 2.0}]}
    one, two, three = prepare_recipe_data(recipe(data), tmp_path / "cache").data.sources("train")
    assert [source.weight for source in (one, two, three)] == [1.0, 1.0, 2.0]
    corpora = [IndexedTokens.open(source.path) for source in (two, three)]
    assert len(corpora[0]) == 2 and np.array_equal(corpora[0].tokens, corpora[1].tokens)
    found = problems({**raw, "train": [raw["train"], str(tmp_path / "*.parquet")]}, tmp_path / "cache")
    assert found[0][0] == "data.train[1]" and "no text in it" in found[0][1]
