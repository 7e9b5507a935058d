"""How much of a sequence its tokens attend to: causally, within their windows and documents."""

from __future__ import annotations

from collections.abc import Iterable

from tplaunch.recipe.schema import Recipe

# Tokens of a document where neither the recipe nor its data tell: of the order of a page on the web or a paper's half.
UNKNOWN_DOCUMENT = 2048


def tokens_seen(seq_len: float, window: float | None = None, document: float | None = None) -> float:
    """The mean number of keys that a query attends to, at all places of a sequence.

    A query at place I of the sequence, A tokens into its document, sees the least of I, A and the window. Documents
    follow one another without regard to where sequences begin, so that I and A are independent, and uniform over the
    sequence and the document: the mean is the integral of P(I > t) P(A > t) up to the window.

    Args:
        window: of the layer; None: none.
        document: length of every document; None: one document without end.
    """
    most = min(length for length in (seq_len, window, document) if length is not None)
    rate = 0.0 if document is None else 1 / document
    return most - most**2 / 2 * (1 / seq_len + rate) + most**3 / 3 * rate / seq_len


def length_of_equal_work(seq_len: float, documents: Iterable[tuple[float, float]]) -> float:
    """The length that all documents would have, if they took the same attention, without a window, as these do.

    Longer than their mean: most tokens lie in long documents.

    Args:
        documents: length of each, and how often it counts.
    """
    tokens = seen = 0.0
    for length, weight in documents:
        tokens += weight * length
        seen += weight * length * tokens_seen(seq_len, document=length)
    mean = seen / tokens
    if mean <= seq_len / 3:  # documents within sequences: mean = d / 2 - d^2 / (6 s)
        return seq_len * (1.5 - (2.25 - 6 * mean / seq_len) ** 0.5)
    return seq_len / max(3 - 6 * mean / seq_len, 1e-9)


def document_length(recipe: Recipe) -> int | None:
    """The length that a recipe's documents are taken to have; None: they are not kept apart."""
    return (recipe.data.document_length or UNKNOWN_DOCUMENT) if recipe.training.document_mask else None


def attended_positions(recipe: Recipe, layers: range | None = None) -> float:
    """Positions of a sequence that attention is counted with, the mean of some layers, by default all: as many as a
    sequence has where attention is causal and no more, for FLOPs are quoted without halving them for the causal mask;
    else twice what a token sees."""
    model, seq_len, document = recipe.model, recipe.training.seq_len, document_length(recipe)
    layers = range(model.num_layers) if layers is None else layers
    if model.window is None or not layers:
        return 2 * tokens_seen(seq_len, None, document)
    seen = {window: 2 * tokens_seen(seq_len, window, document) for window in (model.window, None)}
    return sum(seen[model.window_of(layer)] for layer in layers) / len(layers)
