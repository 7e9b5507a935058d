"""Whether a case can run at all: the rules of `tplaunch.check` that a change of topology or batch can break, as one
quick yes or no, for searches over thousands of cases."""

from __future__ import annotations

from tplaunch.plan.case import Case
from tplaunch.plan.schedule import misfit


def is_legal(case: Case) -> bool:
    """Whether shapes divide, stages are filled, and the schedule takes this many microbatches."""
    model, training, topology, layout = case.model, case.recipe.training, case.topology, case.recipe.topology
    tp, pp = topology.tp, topology.pp
    kv_heads = model.num_kv_heads or model.num_heads
    shapes = (
        model.num_heads % tp == 0
        and (kv_heads % tp == 0 or tp % kv_heads == 0)
        and model.ffn_hidden_size % tp == 0
        and model.padded_vocab_size % tp == 0
        and not (layout.sequence_parallel and training.seq_len % tp)
    )
    stages = pp * layout.virtual_stages
    filled = stages <= model.num_layers and (layout.stage_layers is None or len(layout.stage_layers) == stages)
    per_microbatch = topology.dp * training.micro_batch_size
    batch = training.global_batch_size % per_microbatch == 0 and case.microbatches >= 1
    if not (shapes and filled and batch and topology.dp % layout.dp_replicate == 0):
        return False
    if pp == 1:
        return layout.virtual_stages == 1
    if layout.schedule in ("interleaved1f1b", "interleavedzerobubble") and layout.virtual_stages == 1:
        return False
    split_backward = layout.schedule in ("interleavedzerobubble", "zbvzerobubble", "dualpipev")
    if split_backward and (training.compile or layout.zero >= 2):
        return False
    return not misfit(layout.schedule, pp, layout.virtual_stages, case.microbatches)
