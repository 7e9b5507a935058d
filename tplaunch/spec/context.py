"""Which part of every sequence a context-parallel rank holds."""

from __future__ import annotations

SHORTEST, FEWEST = 16384, 4096  # tokens: of a sequence that is worth sharing, and of a rank's part of it


def pieces(cp_kind: str, cp: int, rank: int, seq_len: int) -> list[range]:
    """The places in the sequence of a cp rank's tokens, as runs in the order in which it holds them.

    "allgather": pieces `rank` and `2 cp - 1 - rank` of 2 cp, so that causal attention is the same work for every rank
    (Llama 3, arXiv 2407.21783, section 3.3.2). "ulysses": one run, for each rank attends over the whole sequence with
    some of the heads (DeepSpeed Ulysses, arXiv 2309.14509). With cp = 1 both are the whole sequence.

    Raises:
        ValueError: the sequence has no equal pieces.
    """
    if cp == 1:
        return [range(seq_len)]
    count = piece_count(cp_kind, cp)
    length, rest = divmod(seq_len, count)
    if rest:
        raise ValueError(f"a sequence of {seq_len} tokens has no {count} equal pieces")
    held = [rank] if cp_kind == "ulysses" else [rank, count - 1 - rank]
    return [range(piece * length, (piece + 1) * length) for piece in held]


def pays(cp: int, seq_len: int) -> bool:
    """Whether sequences are long enough for so many ranks to share each: below, what they exchange costs more than
    what they compute, and tensor parallelism with sequence parallelism divides the same activations."""
    return cp == 1 or (seq_len >= SHORTEST and seq_len // cp >= FEWEST)


def piece_count(cp_kind: str, cp: int) -> int:
    """Into how many equal pieces a sequence is cut."""
    return 1 if cp == 1 else cp if cp_kind == "ulysses" else 2 * cp
