"""The Llama-like models that trainers are measured with, in each trainer's own words. Imports no torch at the start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchtitan.models.llama3 import TransformerModelArgs
    from transformers import LlamaConfig, MixtralConfig

ROPE_THETA, NORM_EPS = 500_000.0, 1e-5


@dataclass(frozen=True)
class Shape:
    """A model and the batch of one optimizer step.

    Args:
        micro: sequences in a microbatch.
        batch: sequences in a step, of all data-parallel ranks together.
        experts: of each layer, as wide as `ffn`; 0: a dense MLP.
        top_k: experts that a token goes to.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    seq: int
    micro: int
    batch: int
    experts: int = 0
    top_k: int = 2

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch * self.seq

    def microbatches(self, dp: int) -> int:
        """Of one step on one data-parallel rank."""
        return self.batch // (self.micro * dp)

    def __str__(self) -> str:
        experts = f" of each of {self.experts} experts, top {self.top_k}" if self.experts else ""
        return (
            f"hidden size {self.hidden:,}, {self.layers} layers, {self.heads} heads, {self.kv_heads} key/value heads, "
            f"ffn {self.ffn:,}{experts}, vocabulary {self.vocab:,}, sequence {self.seq:,}, micro batch {self.micro}, "
            f"batch {self.batch}"
        )

    def recipe(self, topology: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
        """A raw recipe of tplaunch.

        Args:
            topology, training: more of these sections.
        """
        return {
            "name": "measured",
            "model": {
                "hidden_size": self.hidden,
                "num_layers": self.layers,
                "num_heads": self.heads,
                "num_kv_heads": self.kv_heads,
                "ffn_hidden_size": self.ffn,
                "vocab_size": self.vocab,
                "rope_theta": ROPE_THETA,
                "norm_eps": NORM_EPS,
                **({"moe": self._moe()} if self.experts else {}),
            },
            "topology": topology,
            "training": {
                "seq_len": self.seq,
                "micro_batch_size": self.micro,
                "global_batch_size": self.batch,
                "steps": 1,
                **training,
            },
            "data": {"train": "none"},  # tokens are random
        }

    def _moe(self) -> dict[str, Any]:
        return {"experts": self.experts, "top_k": self.top_k, "ffn_hidden_size": self.ffn}

    def transformers(self) -> LlamaConfig | MixtralConfig:
        """The configuration of transformers' Llama, or of its Mixtral."""
        from transformers import LlamaConfig, MixtralConfig

        shared: dict[str, Any] = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.seq,
            "rms_norm_eps": NORM_EPS,
            "tie_word_embeddings": False,
            "use_cache": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
            "attn_implementation": "sdpa",
        }
        if self.experts:
            return MixtralConfig(**shared, num_local_experts=self.experts, num_experts_per_tok=self.top_k)
        return LlamaConfig(**shared)

    def torchtitan(self) -> TransformerModelArgs:
        """The arguments of torchtitan's Llama 3, which computes the MLP's width from a factor."""
        from torchtitan.models.llama3 import TransformerModelArgs

        return TransformerModelArgs(
            dim=self.hidden,
            n_layers=self.layers,
            n_heads=self.heads,
            n_kv_heads=self.kv_heads,
            vocab_size=self.vocab,
            multiple_of=8,
            ffn_dim_multiplier=self.ffn / (8 * self.hidden // 3),
            norm_eps=NORM_EPS,
            rope_theta=ROPE_THETA,
            max_seq_len=self.seq,
        )
