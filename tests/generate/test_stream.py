"""Text as its tokens come."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Trained
from tokenizers import decoders, models, pre_tokenizers, trainers

from tplaunch.data.tokenizer import Tokenizer
from tplaunch.generate.stream import TextStream

TEXT = "The naïve café — 東京の夜、 emoji 🙂🙃 and  spaces\n\n\tend. " * 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    trained = Trained(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        ["the cat sat"],
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet),
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(path))
    return Tokenizer(path)


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_the_pieces_make_the_text(tokenizer: Tokenizer, cut: int) -> None:
    ids = tokenizer.encode(TEXT).tolist()
    stream = TextStream(tokenizer, ids[:cut])
    pieces = [stream.shown, *(stream.add(token) for token in ids[cut:]), stream.rest()]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert max(map(len, pieces[1:-1])) < 10, "text came in lumps"


def test_work_grows_with_the_tokens_not_with_their_square(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = Tokenizer.decode

    def counted(self: Tokenizer, ids: list[int]) -> str:
        decoded.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    ids = tokenizer.encode(TEXT).tolist()
    stream = TextStream(tokenizer, ids[:5])
    for token in ids[5:]:
        stream.add(token)
    assert sum(decoded) < 40 * len(ids)
