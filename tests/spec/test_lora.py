"""What adapters a model has, and what training them costs."""

from __future__ import annotations

from tests.recipes import case, resolved
from tplaunch.recipe.schema import Lora, Model
from tplaunch.spec.flops import matmul_parameters, model_flops_per_token
from tplaunch.spec.lora import adapted, trainable_count
from tplaunch.spec.parameters import parameter_count, parameter_shapes

MODEL = resolved(case()).model
SEQ = 32


def attention(model: Model) -> float:
    """FLOPs of all blocks' attention, forward, one token."""
    return model_flops_per_token(model, SEQ) / 3 - 2.0 * matmul_parameters(model)


def test_factors_are_sliced_where_their_matrix_is() -> None:
    found = {p.name: p for p in adapted(parameter_shapes(MODEL), Lora(rank=4))}
    column = found["layers.0.attention.wk.lora_a"], found["layers.0.attention.wk.lora_b"]
    assert [p.local_shape(4) for p in column] == [(4, 64), (16, 4)]  # two heads, four ranks: a head each
    row = found["layers.1.mlp.down.lora_a"], found["layers.1.mlp.down.lora_b"]
    assert [p.local_shape(2) for p in row] == [(4, 48), (64, 4)]
    assert {p.name for p in found.values() if p.trained} == {name for name in found if "lora_" in name}


def test_what_is_trained_is_counted_apart() -> None:
    # wq 64+64, wk and wv 64+32, wo 64+64, gate and up 64+96, down 96+64
    assert trainable_count(MODEL, Lora(rank=4)) == 2 * 4 * (128 + 2 * 96 + 128 + 3 * 160)
    assert trainable_count(MODEL, None) == parameter_count(MODEL)


def test_frozen_weights_have_no_gradients_and_none_are_needed_before_the_first_adapter() -> None:
    core = attention(MODEL) / 2  # of one of two blocks
    block = (matmul_parameters(MODEL) - 300 * 64) / 2
    qkv, wo = 64 * (64 + 32 + 32), 64 * 64
    counted = model_flops_per_token(MODEL, SEQ, Lora(rank=1, targets=["wq"]))
    first = 2 * qkv + 4 * (block - qkv)  # nobody needs the gradient of the first block's input
    adapters = (2 + 2) * 64 + (4 + 2) * 64 + 6 * 2 * 64  # A without and with one of its input; B, of two blocks
    assert counted == first + 4 * block + 3 * core * 2 + 4 * 300 * 64 + adapters
    late = model_flops_per_token(MODEL, SEQ, Lora(rank=1, targets=["wo"]))
    forward = 2 * (qkv + wo) + core  # of the first block, up to its first adapter
    rest = 4 * (2 * block - qkv - wo) + 3 * core + 4 * 300 * 64
    assert late == forward + rest + (2 + 2) * 64 + (4 + 2) * 64 + 6 * 2 * 64


def test_side_by_side_the_mlp_has_the_blocks_input() -> None:
    model = MODEL.model_copy(update={"parallel_residual": True})
    together = model_flops_per_token(MODEL, SEQ, Lora(rank=1, targets=["wo"]))
    gate_up = 2 * 64 * 96
    # The first block's gate, up and down are before no adapter then.
    assert together - model_flops_per_token(model, SEQ, Lora(rank=1, targets=["wo"])) == 2 * (gate_up + 64 * 96)
