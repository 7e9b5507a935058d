"""Conversations prepared once, with what is learned of them beside; packed whole into rows, where they stay apart."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chats import END, WORDS, conversation, some, write_lines, write_tokenizer
from tests.recipes import case
from tplaunch.data import build as building
from tplaunch.data.amounts import amounts, in_words, unlearned
from tplaunch.data.build import Chat, build
from tplaunch.data.conversations import chat_blocks
from tplaunch.data.corpus import Meta, meta_path, tokenizer_path, verify_corpus
from tplaunch.data.fingerprint import data_facts
from tplaunch.data.fitted import fit
from tplaunch.data.indexed import IndexedTokens, bin_path, idx_path, loss_path, open_loss
from tplaunch.data.inspect import describe
from tplaunch.data.packed import PackedDataset
from tplaunch.data.prepare import prepare_recipe_data
from tplaunch.data.progress import Progress
from tplaunch.data.tokenizer import Tokenizer
from tplaunch.errors import RecipeError, TplaunchError
from tplaunch.recipe.schema import Recipe, Source

RECORDS = some(60)
SILENT = {"messages": conversation("to be")}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "chats.jsonl", [*RECORDS, SILENT])


def prepared(folder: Path, records: list[Any], tokenizer: Path, **how: Any) -> str:
    """The prefix of prepared conversations."""
    folder.mkdir(exist_ok=True)
    build([write_lines(folder / "c.jsonl", records)], folder / "c", tokenizer, chat=Chat(**how))
    return str(folder / "c")


def recipe(train: Path | str, tokenizer: Path | None, seq_len: int = 64, **more: Any) -> Recipe:
    raw = case(training={"seq_len": seq_len})
    data = {"kind": "chat", "train": str(train), "tokenizer": str(tokenizer) if tokenizer else None}
    return Recipe.model_validate({**raw, "data": data, **more})


def rows(prefix: str, seq_len: int, count: int | None = None, **how: Any) -> Any:
    dataset = PackedDataset("chat", [Source(path=prefix)], seq_len, seed=3, **how)
    return dataset.batch(np.arange(count or len(dataset)))


def documents(found: Any) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """The conversations in rows, with what is learned: cut where positions begin anew, without what fills up."""
    cut = []
    for tokens, loss, positions in zip(*found, strict=True):
        starts = [*np.flatnonzero(positions == 0), len(tokens)]
        for start, end in pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            if loss[start:end].any():
                cut.append((tuple(tokens[start:end].tolist()), tuple(loss[start:end].tolist())))
            else:
                assert end == len(tokens), "only what fills a row up has nothing to learn"
    return cut


def test_rows_hold_each_conversation_once_whole_and_with_its_targets(tmp_path: Path, tokenizer: Path) -> None:
    prefix = prepared(tmp_path / "c", RECORDS, tokenizer)
    corpus = IndexedTokens.open(prefix)
    loss = open_loss(Path(prefix), len(corpus.tokens))
    assert len(corpus) == len(RECORDS)
    expected = []
    for number in range(len(corpus)):
        start, end = corpus.document_start(number), corpus.document_start(number + 1)
        expected.append((tuple(corpus.tokens[start:end].tolist()), tuple(map(bool, loss[start:end]))))
    found = rows(prefix, 256)
    assert sorted(documents(found)) == sorted(expected)
    assert len(found.tokens) < len(RECORDS), "none shares a row"


def test_what_fills_a_row_is_no_target_and_the_end_of_a_turn_is(tmp_path: Path, tokenizer: Path) -> None:
    codec = Tokenizer(tokenizer)
    assert codec.decode([codec.eod], skip_special_tokens=False) == END
    found = rows(prepared(tmp_path / "c", [{"messages": conversation("to be", "or not")}], tokenizer), 64)
    (tokens,), (loss,), _ = found
    assert (tokens == codec.eod).sum() > 20, "rows are filled up with the token that ends a turn"
    learned = codec.decode(tokens[loss], skip_special_tokens=False)
    assert learned == f"or not{END}\n"


def test_rows_are_a_function_of_corpus_length_and_seed(tmp_path: Path, tokenizer: Path) -> None:
    prefix = prepared(tmp_path / "c", RECORDS, tokenizer)
    whole = rows(prefix, 128)
    dataset = PackedDataset("chat", [Source(path=prefix)], 128, seed=3)
    for number in (5, 0, len(dataset) - 1):  # alone, in another order
        (alone,), _, _ = dataset.batch(np.array([number]))
        assert (alone == whole.tokens[number]).all()
    other = PackedDataset("chat", [Source(path=prefix)], 128, seed=4).batch(np.arange(len(dataset)))
    assert sorted(documents(other)) == sorted(documents(whole)) and (other.tokens != whole.tokens).any()
    assert len({tuple(row) for row in dataset.batch(np.arange(3 * len(dataset))).tokens.tolist()}) == len(dataset)


def test_long_conversations_keep_their_beginning_or_are_left_out(tmp_path: Path, tokenizer: Path) -> None:
    long = " ".join(WORDS * 3)
    records = [
        {"messages": conversation("to be", long)},
        {"messages": conversation(long, "to be")},
        {"messages": conversation("or", "not")},
        SILENT,
    ]
    prefix = prepared(tmp_path / "c", records, tokenizer)
    found = rows(prefix, 64)
    cut = documents(found)
    corpus = IndexedTokens.open(prefix)
    assert {tokens for tokens, _ in cut} == {
        tuple(corpus.document(0)[:64].tolist()),
        tuple(corpus.document(2).tolist()),
    }
    (amount,) = amounts(recipe(prefix, None, seq_len=64))
    fits = amount.conversations
    assert fits and amount.samples == len(found.tokens) == 2
    assert (fits.count, fits.truncated, fits.dropped, fits.unanswered) == (2, 1, 1, 1)
    line = list(in_words([amount]))[1]
    assert "2 conversations in 2 rows; 1 cut off" in line and "1 left out: nothing of the beginning" in line
    assert "1 left out: nothing in them" in line and not list(unlearned([amount]))
    with pytest.raises(TplaunchError, match="nothing is learned in the first 8 tokens of any"):
        rows(prefix, 8)


def test_answers_that_do_not_stop_a_model_are_warned_of(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "base", eos_token="<|endoftext|>")
    records = [*RECORDS, {"prompt": "Answer: ", "completion": "to be"}]
    found = amounts(recipe(prepared(tmp_path / "c", records, tokenizer), None))
    first, second = unlearned(found)
    assert "end without a token that stops a model" in first.what and "eos_token_id" in first.fix
    assert "1 prompts" in second.what


def test_a_recipe_prepares_conversations_once(
    tmp_path: Path, chats: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TPLAUNCH_CACHE", str(cache))
    monkeypatch.setattr("tplaunch.data.remembered._SETTLED", -1.0)
    (before,) = amounts(recipe(chats, tokenizer))
    assert before.tokens is None and before.conversations is None
    ready = prepare_recipe_data(recipe(chats, tokenizer), progress=False)
    prefix = Path(str(ready.data.train))
    files = (bin_path(prefix), idx_path(prefix), loss_path(prefix), meta_path(prefix), tokenizer_path(prefix))
    assert all(path.exists() for path in files)
    stamps = [path.stat().st_mtime_ns for path in files]
    assert prepare_recipe_data(recipe(chats, tokenizer), progress=False) == ready
    assert [path.stat().st_mtime_ns for path in files] == stamps
    (known,) = amounts(recipe(chats, tokenizer))  # as `plan` sees the raw file, by what the cache remembers
    assert known.conversations and known.conversations.unanswered == 1

    def made(**finetune: Any) -> str:
        return str(prepare_recipe_data(recipe(chats, tokenizer, finetune=finetune), progress=False).data.train)

    marked = write_lines(tmp_path / "t.jinja", [])
    marked.write_text("{{ messages[0].content }}{% generation %}a<|im_end|>{% endgeneration %}")
    others = {made(loss_on="all"), made(chat_template=str(marked)), str(prefix)}
    (tokenizer.parent / "chat_template.jinja").write_text("{{ messages[0].content }}x<|im_end|>")
    others.add(made(loss_on="all"))
    assert len(others) == 4, "other targets are another corpus"


def test_the_mask_is_part_of_what_the_data_are(tmp_path: Path, chats: Path, tokenizer: Path) -> None:
    ready = prepare_recipe_data(recipe(chats, tokenizer), tmp_path / "cache", progress=False)
    facts, path = data_facts(ready, tmp_path / "cache"), loss_path(Path(str(ready.data.train)))
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    assert data_facts(ready, tmp_path / "cache")["train"] != facts["train"]
    with pytest.raises(RecipeError, match=r"\.loss: bytes 0 to [\d,]+ are not what was prepared"):
        prepare_recipe_data(recipe(chats, tokenizer), tmp_path / "cache", progress=False)
    path.write_bytes(content[:-1])
    with pytest.raises(RecipeError, match=r"bytes, but .*\.bin has"):
        prepare_recipe_data(recipe(chats, tokenizer), tmp_path / "cache", progress=False)
    path.unlink()
    with pytest.raises(RecipeError, match="holds no conversations"):
        prepare_recipe_data(recipe(chats, tokenizer), tmp_path / "cache", progress=False)


def test_a_mask_of_other_numbers_is_refused_though_nobody_knows_its_sum(tmp_path: Path, tokenizer: Path) -> None:
    prefix = Path(prepared(tmp_path / "c", RECORDS, tokenizer))
    meta_path(prefix).unlink()
    verify_corpus(prefix, Progress(False))
    content = bytearray(loss_path(prefix).read_bytes())
    content[7] = 2
    loss_path(prefix).write_bytes(content)
    with pytest.raises(TplaunchError, match="are not what was prepared"):
        verify_corpus(prefix, Progress(False))


def test_text_and_conversations_are_not_taken_for_each_other(tmp_path: Path, tokenizer: Path) -> None:
    prefix = prepared(tmp_path / "c", RECORDS, tokenizer)
    as_text = recipe(prefix, None).model_dump()
    as_text["data"]["kind"] = "text"
    with pytest.raises(RecipeError, match="holds conversations"):
        prepare_recipe_data(Recipe.model_validate(as_text), tmp_path / "cache", progress=False)
    loss_path(Path(prefix)).unlink()
    with pytest.raises(RecipeError, match="holds no conversations"):
        prepare_recipe_data(recipe(prefix, None), tmp_path / "cache", progress=False)


def test_an_interrupted_preparation_goes_on(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tplaunch.data.conversations.BLOCK", 2000)
    monkeypatch.setattr(building, "_SYNC_EVERY", 3)
    chats = write_lines(tmp_path / "c.jsonl", [*RECORDS, SILENT, *RECORDS])
    build([chats], tmp_path / "whole", tokenizer, chat=Chat())
    real, seen = building.encode_all, []

    def breaking(*args: Any) -> Any:
        for number, encoded in enumerate(real(*args)):
            if number == 7:
                raise KeyboardInterrupt
            yield encoded

    monkeypatch.setattr(building, "encode_all", breaking)
    with pytest.raises(KeyboardInterrupt):
        build([chats], tmp_path / "again", tokenizer, chat=Chat())

    def counting(rest: Any, *args: Any) -> Any:
        for encoded in real(rest, *args):
            seen.append(encoded)
            yield encoded

    monkeypatch.setattr(building, "encode_all", counting)
    build([chats], tmp_path / "again", tokenizer, chat=Chat())
    assert 0 < len(seen) < len(list(chat_blocks(chats))), "it began anew"
    for path in (bin_path, idx_path, loss_path, meta_path):
        assert path(tmp_path / "again").read_bytes() == path(tmp_path / "whole").read_bytes()


def test_bad_lines_are_named_or_left_out_and_counted(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "c.jsonl", [RECORDS[0], {"text": "a"}, RECORDS[1]])
    with pytest.raises(TplaunchError, match=r"c\.jsonl:2: no messages"):
        build([path], tmp_path / "c", tokenizer, chat=Chat())
    meta = build([path], tmp_path / "c", tokenizer, chat=Chat(), skip_bad=True)
    assert meta.documents == 2 and "left out 1 lines" in capsys.readouterr().err
    only = write_lines(tmp_path / "silent.jsonl", [SILENT])
    with pytest.raises(TplaunchError, match="no answer in"):
        build([only], tmp_path / "s", tokenizer, chat=Chat())


def test_files_that_hold_no_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content, said in (
        ("a.txt", "a", "are read from JSON lines"),
        ("a.jsonl", '[{"messages": []}]', "one JSON array"),
        ("b.jsonl", '\n{"messages": "' + "a" * 5000 + '"}\n', "b.jsonl:2: the line has more than"),
    ):
        path = tmp_path / name
        path.write_text(content)
        monkeypatch.setattr("tplaunch.data.conversations.LONGEST", 4000)
        monkeypatch.setattr("tplaunch.data.conversations.BLOCK", 1000)
        with pytest.raises(TplaunchError, match=said):
            list(chat_blocks(path))


def test_inspect_shows_what_is_learned(tmp_path: Path, tokenizer: Path) -> None:
    prefix = prepared(tmp_path / "c", [{"messages": conversation("to be", "or not")}], tokenizer)
    report = describe(Path(prefix))
    (sample,) = report["samples"]
    assert sample["text"].endswith("<|im_start|>assistant\n\u27e6or not<|im_end|>\n\u27e7")
    meta = Meta.read(Path(prefix))
    assert meta and meta.chat and report["learned"] == meta.chat.targets == open_loss(Path(prefix), meta.tokens).sum()


def test_fitting_needs_no_facts_beside(tmp_path: Path, tokenizer: Path) -> None:
    prefix = prepared(tmp_path / "c", RECORDS, tokenizer)
    known = fit(prefix, 64)
    (before,) = amounts(recipe(prefix, None))
    meta_path(Path(prefix)).unlink()
    (after,) = amounts(recipe(prefix, None))
    assert fit(prefix, 64) == known and known.truncated and before.samples == after.samples
    assert before.conversations and after.conversations
    assert before.conversations.answers and after.conversations == replace(before.conversations, answers=0)
