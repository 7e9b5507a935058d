"""Memory of keys and values, said before anything starts. Torch-free."""

from __future__ import annotations

from tplaunch.recipe.schema import Recipe
from tplaunch.spec.pages import PAGE, pages_for
from tplaunch.spec.precision import COMPUTE_BYTES
from tplaunch.spec.stages import stage_ranges


def page_bytes(recipe: Recipe) -> int:
    """Bytes of a page on the rank with the most layers: keys and values of its heads, in the compute dtype."""
    model, tp = recipe.model, recipe.topology.tp
    if model.latent is not None:
        latent = model.latent
        features = model.num_heads // tp * (latent.nope_dim + latent.rope_dim + latent.value_dim)
    else:
        assert model.num_kv_heads is not None and model.head_dim is not None
        features = 2 * max(1, model.num_kv_heads // tp) * model.head_dim
    layers = max(len(layers) for layers in stage_ranges(recipe))
    return PAGE * layers * features * COMPUTE_BYTES[recipe.training.precision]


def most_pages(prompts: list[int], max_tokens: int, batch_size: int) -> int:
    """Pages that sequences can come to need together.

    Args:
        prompts: tokens of each prompt.
        max_tokens: made after each at most.
        batch_size: sequences that grow together at most.
    """
    needs = sorted((pages_for(length + max_tokens - 1) for length in prompts), reverse=True)  # the last is not read
    return sum(needs[:batch_size])
