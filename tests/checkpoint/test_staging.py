"""State copied to host memory."""

from __future__ import annotations

import torch

from tplaunch.checkpoint.staging import HostCopies


def test_only_the_rows_are_copied_and_memory_is_used_again() -> None:
    flat = torch.arange(1000.0)
    rows = flat[10:20].view(5, 2)
    copies = HostCopies()
    first = copies.copy({"rows": rows})["rows"]
    assert torch.equal(first, rows)
    assert first.untyped_storage().nbytes() == 10 * 4
    rows += 1
    assert first[0, 0] == 10  # training goes on while the copy is written
    second = copies.copy({"rows": rows})["rows"]
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(second, rows)
