"""Which samples a rank reads, what it makes of them, and their way to a GPU."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.recipes import case, resolved
from tplaunch.data.dataset import TokenDataset, TokenRows
from tplaunch.parallel.cross_entropy import IGNORE
from tplaunch.parallel.mesh import ContextParallel
from tplaunch.spec.context import pieces
from tplaunch.spec.course import Course
from tplaunch.train.batch import Batch, make_batch, random_batch, share

TRAINING = {"seq_len": 4, "global_batch_size": 8, "micro_batch_size": 1, "steps": 9}


def test_a_batch_is_pinned_before_it_is_wanted_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    tokens, labels, positions = (torch.full((2, 3), number) for number in range(3))
    batch = Batch(tokens, labels, positions)
    assert batch.pinned_for(torch.device("cpu")) is batch and not pinned
    ready = batch.pinned_for(torch.device("cuda"))
    assert len(pinned) == 3 and all(a is b for a, b in zip(pinned, (tokens, labels, positions), strict=True))
    assert ready.labels.equal(labels) and ready.labels is not labels
    assert ready.to(torch.device("meta")).tokens.device.type == "meta"
    assert Batch(tokens, labels).to(torch.device("meta")).positions is None
    assert len(pinned) == 3, "the training thread pinned memory"


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_the_shares_of_a_step_are_what_comes_next(dp: int) -> None:
    ramp = {"start": 4, "increment": 4, "steps": 2}  # batches of 4, 4, 8, 8, 8
    recipe = resolved(case(1, 1, dp, training={**TRAINING, "batch_ramp_up": ramp}))
    for step, samples in ((2, range(4, 8)), (3, range(8, 16)), (5, range(24, 32))):
        assert [sample for rank in range(dp) for sample in share(Course(recipe), step, rank, dp)] == [*samples]
        ahead = [sample for rank in range(dp) for sample in share(Course(recipe), step, rank, dp, ahead=5)]
        assert ahead == [sample + 5 for sample in samples]


def test_microbatches_are_rows_in_order() -> None:
    tokens = torch.arange(12).view(4, 3)
    whole = Batch(tokens, tokens + 100, tokens + 200)
    first, second = whole.split(2)
    assert first.tokens.equal(tokens[:2]) and second.tokens.equal(tokens[2:])
    assert first.labels.equal(tokens[:2] + 100) and second.labels.equal(tokens[2:] + 100)
    assert first.positions is not None and second.positions is not None
    assert first.positions.equal(tokens[:2] + 200) and second.positions.equal(tokens[2:] + 200)
    assert [part.positions for part in Batch(tokens, tokens).split(2)] == [None, None]


class Documents:
    """Samples of four tokens, the one behind them, and their places in documents, of which one begins amid each."""

    def batch(self, numbers: Any, *, documents: bool) -> TokenRows:
        tokens, positions = np.arange(4) + 10 * numbers[:, None], np.tile([0, 1, 0, 1, 2], (len(numbers), 1))
        rows = TokenRows(tokens, tokens + 1)
        return rows._replace(positions=positions[:, :-1], begins=positions[:, 1:] == 0) if documents else rows


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("eod_mask_loss", [False, True])
def test_targets_are_the_next_tokens_but_for_the_first_of_a_document(eod_mask_loss: bool, document_mask: bool) -> None:
    masks = {"eod_mask_loss": eod_mask_loss, "document_mask": document_mask}
    batch = make_batch(resolved(case(training={**TRAINING, **masks})), cast(TokenDataset, Documents()), range(3, 5))
    assert batch.tokens.tolist() == [[30, 31, 32, 33], [40, 41, 42, 43]]
    cut = [IGNORE, IGNORE] if eod_mask_loss else [32, 42]
    assert batch.labels.tolist() == [[31, cut[0], 33, 34], [41, cut[1], 43, 44]]
    assert (batch.positions is None) != document_mask
    if batch.positions is not None:
        assert batch.positions.tolist() == [[0, 1, 0, 1]] * 2


class Pieces:
    """A context-parallel rank with the pieces of four."""

    def __init__(self, kind: str, rank: int) -> None:
        self.kind, self.rank = kind, rank

    def pieces(self, seq_len: int) -> list[range]:
        return pieces(self.kind, 4, self.rank, seq_len)

    cut = ContextParallel.cut


@pytest.mark.parametrize("kind", ["allgather", "ulysses"])
def test_every_target_of_a_row_is_a_rank_s_though_it_is_another_s_token(kind: str) -> None:
    row = torch.arange(17).repeat(2, 1)
    labels = row[:, 1:].masked_fill(row[:, 1:] % 5 == 0, IGNORE)
    whole = Batch(row[:, :-1], labels, row[:, :-1])
    cut = [whole.cut(cast(ContextParallel, Pieces(kind, rank))) for rank in range(4)]
    for one in cut:
        assert one.tokens.shape == one.labels.shape == (2, 4) and one.positions is whole.positions
        assert one.labels.equal((one.tokens + 1).masked_fill((one.tokens + 1) % 5 == 0, IGNORE))
    counts = [int((one.labels != IGNORE).sum()) for one in cut]
    assert sum(counts) == int((labels != IGNORE).sum()) and len(set(counts)) > 1, "masked alike everywhere"
    assert sorted(torch.cat([one.tokens[0] for one in cut]).tolist()) == list(range(16))


def test_random_batches_have_the_shapes_of_real_ones() -> None:
    recipe = resolved(case(1, 1, 4, training={**TRAINING, "document_mask": True}))
    batch = random_batch(recipe, 4, True)
    assert batch.tokens.shape == batch.labels.shape == (2, 4)
    assert batch.labels[:, :-1].equal(batch.tokens[:, 1:])
    assert batch.positions is not None and batch.positions.tolist() == [[0, 1, 2, 3]] * 2
    short = resolved(
        case(1, 1, 4, training={**TRAINING, "document_mask": True}) | {"data": {"train": "x", "document_length": 3}}
    )
    positions = random_batch(short, 4, True).positions
    assert positions is not None and positions.tolist() == [[0, 1, 2, 0]] * 2
    none = random_batch(recipe, 4, False)
    assert none.tokens.shape == none.labels.shape == (2, 0) and none.positions is None
    assert random_batch(resolved(case(training=TRAINING)), 1, True).positions is None
