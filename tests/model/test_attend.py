"""Attention's kernels against the formula, and which of them is taken."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tplaunch.model import attend as chooser
from tplaunch.model import attend_blocked, attend_flex, attend_packed
from tplaunch.model.attend import Attending, attend, choose, document_starts

B, HEADS, KV, D = 2, 4, 2, 16


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    how: Attending,
    *,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
    first_query: int = 0,
) -> Tensor:
    """The formula, with all pairs of query and key."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * (how.scale or q.shape[-1] ** -0.5)
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    places = torch.arange(first_query, first_query + q.shape[2])
    begins = torch.zeros(1, q.shape[2], dtype=torch.int64) if starts is None else starts
    ago = places[:, None] - torch.arange(k.shape[2])
    hidden = (ago < 0) | (torch.arange(k.shape[2]) < begins[..., None])
    if how.window is not None:
        hidden |= ago >= how.window
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(wide)[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    out = scores.softmax(-1)[..., : k.shape[2]] @ v.to(wide)
    return out.to(q.dtype).permute(2, 0, 1, 3).flatten(2)


def documents(keys: int, first_query: int) -> Tensor:
    """Documents of two rows that begin inside, at, and before the queries."""
    positions = torch.arange(keys).repeat(B, 1)
    for row, cuts in enumerate(((1, keys // 3, keys // 2), (keys // 4, keys - 1))):
        for cut in cuts:
            positions[row, cut:] = torch.arange(keys - cut)
    return document_starts(positions)[:, first_query:]


def inputs(queries: int, keys: int, dtype: torch.dtype, kv: int = KV, value_dim: int = D) -> list[Tensor]:
    random = torch.Generator().manual_seed(queries + keys)
    sizes = ((queries, HEADS, D), (keys, kv, D), (keys, kv, value_dim))
    found = [torch.randn(n, B, heads, d, generator=random, dtype=torch.float64) for n, heads, d in sizes]
    found.append(torch.randn(HEADS, generator=random, dtype=torch.float64))
    return [x.to(dtype).requires_grad_(torch.is_grad_enabled()) for x in found]


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    if not out.requires_grad:
        return []
    random = torch.Generator().manual_seed(5)
    weight = torch.randn(out.shape, generator=random, dtype=torch.float64).to(out.dtype)
    return list(torch.autograd.grad((out * weight).sum(), leaves))


def compare(
    how: Attending,
    *,
    first_query: int,
    keys: int,
    masked: bool,
    sunk: bool,
    dtype: torch.dtype,
    value_dim: int = D,
) -> None:
    leaves = inputs(
        keys - first_query, keys + 2, dtype, value_dim=value_dim
    )  # two keys after the last query are seen by none
    more: dict[str, Any] = {"first_query": first_query, "starts": documents(keys, first_query) if masked else None}
    if sunk:
        more["sinks"] = leaves[3]
    used = leaves[: 4 if sunk else 3]
    ours, theirs = attend(*leaves[:3], how, **more), dense(*leaves[:3], how, **more)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    assert ours.shape == theirs.shape and ours.dtype == dtype
    for one, other in zip([ours, *gradients(ours, used)], [theirs, *gradients(theirs, used)], strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm().item() <= tolerance * max(1.0, other.norm().item())


HOWS = {
    "causal": Attending(),
    "window": Attending(window=7),
    "all": Attending(window=50, softcap=1.5, scale=0.3),
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sunk", [False, True])
def test_blocks_give_what_the_formula_does(monkeypatch: pytest.MonkeyPatch, how: str, masked: bool, sunk: bool) -> None:
    monkeypatch.setattr(attend_blocked, "_SCORES", 16_000)  # blocks of several sizes
    for first_query, dtype in ((0, torch.float64), (37, torch.float64), (0, torch.float32), (37, torch.bfloat16)):
        compare(HOWS[how], first_query=first_query, keys=150, masked=masked, sunk=sunk, dtype=dtype)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("value_dim", [D // 2, D + 8])
def test_values_of_another_width(how: str, value_dim: int) -> None:
    for first_query, dtype in ((0, torch.float64), (37, torch.float64), (0, torch.float32), (149, torch.float64)):
        for masked in (False, True):
            shape: dict[str, Any] = {"keys": 150, "masked": masked, "sunk": masked, "value_dim": value_dim}
            compare(HOWS[how], first_query=first_query, dtype=dtype, **shape)


@pytest.mark.parametrize("window", [1, 8])
@pytest.mark.parametrize("sunk", [False, True])
def test_a_window_counts_its_query(window: int, sunk: bool) -> None:
    for keys in (window, window + 1, window + 2, 3 * window + 1, *([window - 1] if window > 1 else [])):
        compare(Attending(window=window), first_query=0, keys=keys, masked=False, sunk=sunk, dtype=torch.float64)
        # One query with a cache.
        compare(Attending(window=window), first_query=keys - 1, keys=keys, masked=False, sunk=sunk, dtype=torch.float64)


def test_what_is_hidden_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs of query and key for which there are scores."""
    q, k, v, _ = inputs(1024, 1024, torch.float32)
    pairs = []
    real = attend_blocked._scores

    def scores(q: Tensor, k: Tensor, seen: Tensor, softcap: float | None) -> Tensor:
        pairs.append(seen.numel() * q.shape[0])
        return real(q, k, seen, softcap)

    monkeypatch.setattr(attend_blocked, "_scores", scores)

    def computed(**more: Any) -> int:
        pairs.clear()
        attend(q, k, v, Attending(window=more.pop("window", None)), **more).sum().backward()
        return sum(pairs)

    whole = computed(starts=torch.zeros(B, 1024, dtype=torch.int64))
    eighths = (torch.arange(1024) // 128 * 128).repeat(B, 1)
    assert computed(starts=eighths) < whole / 5  # an eighth, and half a block of queries at each document's diagonal
    assert computed(window=128) < whole / 2.5
    assert computed(window=128, starts=eighths) < whole / 5


def test_a_document_that_began_before_the_sample() -> None:
    assert document_starts(torch.tensor([[7, 8, 0, 1, 0]])).tolist() == [[0, 0, 2, 2, 4]]


def packed_by_hand(q: Tensor, k: Tensor, v: Tensor, pack: Any, left: int, *how: Any) -> Tensor:
    """What the kernels for packed sequences compute: causal, and ending with the last key."""
    softcap, scale = how if len(how) == 2 else (None, how[0])
    queries, keys = pack.queries.tolist(), pack.keys.tolist()
    assert len(keys) == len(queries) and keys[-1] == len(k) == len(v) and queries[-1] == len(q)
    lengths = [b - a for a, b in pairwise(queries)]
    assert min(lengths) > 0 and max(lengths) == pack.longest_queries
    assert max(b - a for a, b in pairwise(keys)) == pack.longest_keys
    outputs = []
    for number, count in enumerate(lengths):
        mine, theirs = slice(queries[number], queries[number + 1]), slice(keys[number], keys[number + 1])
        first = theirs.stop - theirs.start - count
        window = Attending(None if left < 0 else left + 1, softcap, scale)
        parts = (q[mine, None], k[theirs, None], v[theirs, None])
        outputs.append(dense(*parts, window, first_query=first)[:, 0].unflatten(-1, (-1, v.shape[-1])))
    return torch.cat(outputs)


@pytest.mark.parametrize("kernel", ["flash_attn", "varlen", pytest.param("flex", marks=pytest.mark.slow)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("first_query", "keys", "window"), [(0, 300, None), (140, 290, 40), (128, 384, 140)])
def test_what_a_gpu_would_be_given(
    monkeypatch: pytest.MonkeyPatch, kernel: str, masked: bool, first_query: int, keys: int, window: int | None
) -> None:
    """The kernels' inputs: packs and blocks. flex_attention runs without its compiler, the others by hand."""
    monkeypatch.setattr(chooser, "choose", lambda how, **_: kernel)
    monkeypatch.setattr(attend_packed, "_flash_attn", packed_by_hand)
    monkeypatch.setattr(attend_packed, "_varlen", packed_by_hand)
    monkeypatch.setattr(attend_flex, "_compiled", lambda: attend_flex.flex_attention)
    how = Attending(window, 2.0 if kernel != "varlen" else None, 0.2)
    with torch.set_grad_enabled(kernel != "flex"):  # which has no backward pass on a CPU
        shape: dict[str, Any] = {"first_query": first_query, "keys": keys, "masked": masked, "sunk": kernel == "flex"}
        for value_dim in (D, D // 2):
            compare(how, dtype=torch.float32, value_dim=value_dim, **shape)


def test_blocks_that_all_queries_see_are_whole() -> None:
    keys, places = 600, torch.arange(130, 600)
    lowest = torch.maximum(documents(keys, 130), places - 299)
    mask = attend_flex.block_mask(lowest, places, keys)
    columns = torch.arange(keys)
    seen = torch.zeros(B, 512, 640, dtype=torch.bool)
    seen[:, : len(places), :keys] = (places[:, None] >= columns) & (columns >= lowest[..., None])
    blocks = seen.view(B, 4, 128, 5, 128).transpose(2, 3).flatten(3)
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    for row in range(B):
        for i in range(4):
            real = blocks[row, i, :, : 128 * (len(places) - 128 * i)]  # of the last block, the queries that are there
            whole = mask.full_kv_indices[row, 0, i][: mask.full_kv_num_blocks[row, 0, i]].tolist()
            part = mask.kv_indices[row, 0, i][: mask.kv_num_blocks[row, 0, i]].tolist()
            assert whole == real.all(-1).nonzero().flatten().tolist()
            assert part == (real.any(-1) & ~real.all(-1)).nonzero().flatten().tolist()
    given = mask.mask_mod(torch.arange(B)[:, None, None], columns[:1], torch.arange(len(places))[:, None], columns)
    assert torch.equal(given, seen[:, : len(places), :keys])


HALF, FULL = torch.bfloat16, torch.float32
TAKEN = [
    ({"device": "cpu"}, "sdpa"),
    ({"device": "cpu", "documents": True}, "blocked"),
    ({"device": "cpu", "how": Attending(window=9)}, "blocked"),
    ({"device": "cpu", "first_query": 8}, "blocked"),
    ({"device": "cpu", "first_query": 8, "queries": 1}, "sdpa"),
    ({}, "sdpa"),
    ({"how": Attending(scale=0.1)}, "sdpa"),
    ({"first_query": 8}, "varlen"),
    ({"documents": True}, "varlen"),
    ({"how": Attending(window=9), "documents": True}, "varlen"),
    ({"how": Attending(softcap=9.0)}, "flex"),
    ({"sinks": True}, "flex"),
    ({"documents": True, "dtype": FULL}, "flex"),
    ({"documents": True, "head_dim": 320}, "flex"),
    ({"dtype": FULL}, "sdpa"),
    ({"dtype": torch.float64}, "blocked"),
    ({"sinks": True, "queries": 1, "first_query": 8}, "blocked"),
    ({"device": "cpu", "value_dim": 64}, "blocked"),
    ({"head_dim": 192}, "sdpa"),
    ({"head_dim": 192, "value_dim": 128, "documents": True}, "varlen"),
    ({"value_dim": 320, "documents": True}, "flex"),
]


@pytest.mark.parametrize(("case", "kernel"), TAKEN, ids=str)
def test_which_kernel_is_taken(monkeypatch: pytest.MonkeyPatch, case: dict[str, Any], kernel: str) -> None:
    usual = {"how": Attending(), "device": "cuda", "dtype": HALF, "head_dim": 128, "queries": 64, "first_query": 0}
    asked = {**usual, "value_dim": case.get("head_dim", 128), "documents": False, "sinks": False, **case}
    how = asked.pop("how")
    monkeypatch.setattr(chooser, "_has_flash_attn", lambda: False)
    assert choose(how, **asked) == kernel
    monkeypatch.setattr(chooser, "_has_flash_attn", lambda: True)
    better = kernel == "varlen" or how.softcap is not None
    assert choose(how, **asked) == ("flash_attn" if better else kernel)
