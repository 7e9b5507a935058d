"""A batch on its way to a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tplaunch.train.batch import Batch


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
