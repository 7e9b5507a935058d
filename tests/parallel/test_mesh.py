"""Which device a rank takes."""

from __future__ import annotations

import pytest
import torch

from tplaunch.machine import SHARE_GPUS
from tplaunch.parallel import mesh


def test_ranks_share_gpus_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert mesh.local_device(3) == torch.device("cuda", 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(RuntimeError, match="8 ranks of this node would share 4 GPUs") as caught:
        mesh.local_device(5)
    assert "ask for 8 GPUs a node" in str(caught.value)
    monkeypatch.setenv(SHARE_GPUS, "1")
    assert mesh.local_device(5) == torch.device("cuda", 1)
    assert taken == [torch.device("cuda", 3), torch.device("cuda", 1)]
