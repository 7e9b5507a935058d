"""A pipeline stage of the transformer: consecutive blocks; the first has the embedding too, the last the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from tplaunch.kernels.matmul import linear
from tplaunch.model.attend import document_starts
from tplaunch.model.block import TransformerBlock
from tplaunch.model.cache import StageCache
from tplaunch.model.norm import make_norm
from tplaunch.model.rope import rope_table, still_table
from tplaunch.model.watch import on_backward
from tplaunch.parallel.collectives import enter_region
from tplaunch.parallel.cross_entropy import output_cross_entropy, score_labels
from tplaunch.parallel.layers import VocabParallelEmbedding
from tplaunch.parallel.linear import local, parameter
from tplaunch.parallel.mesh import Mesh, TensorParallel
from tplaunch.recipe.schema import Model, Training
from tplaunch.spec.recompute import chosen


class LearnedPosition(nn.Module):
    """A table of position vectors, whole on every tp rank."""

    def __init__(self, rows: int, hidden_size: int, *, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.weight = parameter((rows, hidden_size), tp.mesh, (Replicate(),))

    def forward(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """[s or s/tp, b, h] -> the same, each position's vector added; positions: int64 [b or 1, s], or None for
        0..s-1."""
        first = self.tp.rank * x.shape[0] if self.tp.sequence_parallel else 0
        mine = slice(first, first + x.shape[0])
        weight = local(self.weight)
        return x + (weight[mine, None] if positions is None else F.embedding(positions.t()[mine], weight))


class Output(nn.Module):
    """The output matrix, rows split over tp: the loss where labels are given, else whole logits."""

    def __init__(self, model: Model, training: Training, *, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.vocab_size = model.vocab_size
        self.chunk = training.loss_chunk
        self.z_loss = training.z_loss
        self.softcap = model.logit_softcap
        self.divisor = model.logit_divisor
        self.weight = parameter((model.padded_vocab_size, model.hidden_size), tp.mesh, (Shard(0),))

    def forward(self, x: Tensor, labels: Tensor | None, loss_scale: float = 1.0) -> Tensor:
        """x [s or s/tp, b, h]; labels int64 [b, s] -> scaled sum of losses [1], or None -> logits [b, s, vocab]."""
        weight = local(self.weight)
        if self.divisor != 1.0:
            x = x / self.divisor  # as its logits
        if labels is None:
            logits = linear(enter_region(x, self.tp), weight)
            if self.tp.size > 1:
                slices = [torch.empty_like(logits) for _ in range(self.tp.size)]
                dist.all_gather(slices, logits.contiguous(), group=self.tp.group)
                logits = torch.cat(slices, dim=-1)
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            return logits[..., : self.vocab_size].transpose(0, 1)
        return output_cross_entropy(
            x,
            weight,
            labels,
            tp=self.tp,
            vocab_size=self.vocab_size,
            chunk=self.chunk,
            z_loss=self.z_loss,
            softcap=self.softcap,
            scale=loss_scale,
        )

    def score(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, of each label its loss and whether no token is likelier, [b, s] each (`score_labels`)."""
        return score_labels(
            x if self.divisor == 1.0 else x / self.divisor,
            local(self.weight),
            labels,
            tp=self.tp,
            vocab_size=self.vocab_size,
            chunk=self.chunk,
            softcap=self.softcap,
        )


class TransformerStage(nn.Module):
    """Some consecutive layers of the model.

    Parameter names are global (`layers.17.attention.wq.weight`), the same on every topology; they are those of
    `tplaunch.spec.parameters.parameter_shapes`. A tied output matrix on another stage than the embedding is the one
    exception: `output.weight` there is a copy of `embedding.weight` (see `tied_copy`).

    Args:
        model: the whole model.
        training: how it is trained (sequence length, recomputation, loss options).
        layers: global numbers of this stage's blocks.
        first, last: whether the embedding and the head are here.
        mesh: the device mesh.
    """

    rope: Tensor | None
    window_rope: Tensor | None
    still_rope: Tensor | None

    def __init__(self, model: Model, training: Training, layers: range, *, first: bool, last: bool, mesh: Mesh) -> None:
        super().__init__()
        self.spec = model
        self.tp = mesh.tp
        self.cp = mesh.cp
        tp = mesh.tp
        self.embedding = VocabParallelEmbedding(model.padded_vocab_size, model.hidden_size, tp=tp) if first else None
        self.position = None
        if first and model.position == "learned":
            assert model.max_position is not None
            self.position = LearnedPosition(model.max_position, model.hidden_size, tp=tp)
        self.layers = nn.ModuleDict(
            {str(i): TransformerBlock(model, mesh, i, again=chosen(training, i)) for i in layers}
        )
        self.norm = make_norm(model, tp=tp) if last else None
        self.output = Output(model, training, tp=tp) if last else None
        self.tied_copy = model.tie_embeddings and last and not first
        if model.tie_embeddings and self.embedding is not None and self.output is not None:
            self.output.weight = self.embedding.weight
        self.rope = self.window_rope = self.still_rope = None
        self._tells_documents = training.document_mask
        # Told a block's name as a forward pass enters it and as a backward pass leaves it, if anybody wants to know.
        # What stands before and after the blocks is entered by its own name.
        self.block_begins: Callable[[str], None] = _ignore
        self.block_done: Callable[[str], None] | None = None

    def _entering(self, x: Tensor, number: str) -> Tensor:
        """The input of a block, watched for the backward pass that leaves it."""
        block = f"layers.{number}"
        self.block_begins(block)
        if self.block_done is None or not x.requires_grad:
            return x
        return on_backward(x, partial(self.block_done, block))

    def compile_blocks(self) -> None:
        """Compile the blocks, part by part."""
        for block in self.layers.values():
            assert isinstance(block, TransformerBlock)
            block.compile_parts()

    def place_rope(self, seq_len: int, device: torch.device) -> None:
        """Compute the rotary tables for `seq_len` positions on `device`; called once the parameters are there."""
        places = torch.arange(seq_len, device=device)
        if self.cp is not None and not self._tells_documents:  # else any place may be that of a token here
            places = self.cp.cut(places[None])[0]
        self.rope, self.window_rope, self.still_rope = self._ropes(places)

    def _ropes(self, places: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The rotary tables of some positions, [s]: of the blocks, of those with a window if theirs is another, and of
        those that turn nothing if there are any."""
        if self.spec.position != "rope":
            return None, None, None
        dtype = torch.float64 if next(self.parameters()).dtype == torch.float64 else torch.float32
        table = rope_table(self.spec, places, dtype)
        other = self.spec.window_rope_theta is not None
        still = None if self.spec.rope_layers is None else still_table(self.spec, dtype, places.device)
        return table, rope_table(self.spec, places, dtype, window=True) if other else None, still

    def _which_rope(self, number: str) -> int:
        """Which of `_ropes` a block has."""
        layer = int(number)
        if not self.spec.turns(layer):
            return 2
        return int(self.spec.window_rope_theta is not None and self.spec.window_of(layer) is not None)

    def embed(self, tokens: Tensor, positions: Tensor | None) -> Tensor:
        """int64 [b, s] -> [s or s/tp, b, h], on the first stage."""
        assert self.embedding is not None
        self.block_begins("embedding")
        x: Tensor = self.embedding(tokens)
        if self.spec.scale_embeddings:
            x = x * x.new_full((), self.spec.hidden_size**0.5)  # in the dtype of x, as Gemma has it
        if self.spec.embedding_multiplier != 1.0:
            x = x * self.spec.embedding_multiplier
        if self.position is not None:
            self.block_begins("position")
            x = self.position(x, positions)
        return x

    def forward(
        self, x: Tensor, labels: Tensor | None = None, positions: Tensor | None = None, loss_scale: float = 1.0
    ) -> Tensor:
        """Run the stage on one microbatch.

        Args:
            x: int64 tokens [b, s] on the first stage, else the previous stage's output [s or s/tp, b, h].
            labels: int64 [b, s], read by the last stage only.
            positions: int64 [b, s], each token's place in its document, to keep documents of a sample apart; None
                for one document a sample. Of whole sequences, where x and labels are of this rank's pieces of them.
            loss_scale: factor of the summed loss; 1 / (tokens of the global batch) makes it that batch's mean.

        Returns:
            [s or s/tp, b, h]; on the last stage the loss [1], or logits [b, s, vocab] without labels.
        """
        ropes, starts, cp = [self.rope, self.window_rope], None, self.cp
        if positions is not None:
            starts = document_starts(positions)
            if cp is not None:
                positions = cp.cut(positions)
                starts = cp.cut(starts) if cp.kind == "allgather" else starts
            ropes = _at(ropes, positions)
        elif cp is not None and self.position is not None:
            positions = cp.cut(torch.arange(cp.size * x.shape[1], device=x.device)[None])
        if self.embedding is not None:
            x = self.embed(x, positions)
        return self._head(self._through_blocks(x, [*ropes, self.still_rope], starts), labels, loss_scale)

    def _through_blocks(self, x: Tensor, ropes: Sequence[Tensor | None], starts: Tensor | None) -> Tensor:
        """Hidden states through all blocks, without a cache; `ropes` as `_ropes` gives them."""
        for number, block in self.layers.items():
            x = block(self._entering(x, number), ropes[self._which_rope(number)], starts)
        return x

    def score(self, x: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Run the stage on rows of any length, without context parallelism; see `forward`.

        Returns:
            [s or s/tp, b, h]; on the last stage of each label its loss and whether no token is likelier, [b, s] each.
        """
        *turned, still = self._ropes(torch.arange(labels.shape[1], device=x.device))
        starts = None
        if positions is not None:
            starts, turned = document_starts(positions), _at(turned, positions)
        if self.embedding is not None:
            x = self.embed(x, positions)
        x = self._through_blocks(x, [*turned, still], starts)
        return x if self.output is None else self.output.score(self._normed(x), labels)

    def cache(self) -> StageCache:
        """What `extend` keeps of tokens, with none as yet."""
        return StageCache(len(self.layers), self._ropes, last=self.output is not None)

    def extend(self, x: Tensor, cache: StageCache) -> Tensor:
        """Run the stage on further tokens of some sequences, one after the other, without gradients, and with whole
        sequences on each rank (`whole_sequences`).

        Args:
            x: int64 tokens [1, tokens] on the first stage, else the previous stage's output [tokens, 1, h].
            cache: of the tokens before these, told which these are (`begin`).

        Returns:
            [tokens, 1, h]; on the last stage the logits of what follows each sequence's last token, [1, sequences,
            vocab].
        """
        now = cache.now
        if self.embedding is not None:
            x = self.embed(x, now.places[None])
        ropes = cache.ropes()
        for (number, block), kept in zip(self.layers.items(), cache.blocks, strict=True):
            x = block(self._entering(x, number), ropes[self._which_rope(number)], None, kept)
        return self._head(x, None)

    def _head(self, x: Tensor, labels: Tensor | None, loss_scale: float = 1.0) -> Tensor:
        """On the last stage what the blocks give -> loss or logits."""
        return x if self.output is None else self.output(self._normed(x), labels, loss_scale)

    def _normed(self, x: Tensor) -> Tensor:
        """On the last stage what the blocks give -> what the output layer, which comes next, reads."""
        assert self.norm is not None
        self.block_begins("norm")
        self.block_begins("output")
        return self.norm(x)


def _at(ropes: Sequence[Tensor | None], positions: Tensor) -> list[Tensor | None]:
    """The rows of rotary tables at the place of each token in its document, positions int64 [b, s]."""
    return [None if rope is None else rope[:, positions.t(), 0] for rope in ropes]


def _ignore(block: str) -> None:
    """Nobody wants to know."""
