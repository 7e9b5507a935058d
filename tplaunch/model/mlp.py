"""The dense MLP of a block, and of shared experts."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tplaunch.model.gated import side_by_side
from tplaunch.model.residual import added
from tplaunch.parallel.layers import ColumnParallelLinear, RowParallelLinear, column_parallel
from tplaunch.parallel.mesh import Mesh
from tplaunch.recipe.schema import Model


class MLP(nn.Module):
    """SwiGLU or GeGLU (Shazeer 2020, arXiv 2002.05202), or GELU, exact or in its tanh form (GPT-2).

    Args:
        ffn: width between its matmuls; default: the model's.
        bias: default: as the model has it.
    """

    def __init__(self, model: Model, mesh: Mesh, *, ffn: int | None = None, bias: bool | None = None) -> None:
        super().__init__()
        hidden, tp = model.hidden_size, mesh.tp
        ffn = model.ffn_hidden_size if ffn is None else ffn
        bias = model.biased_mlp if bias is None else bias
        self.gate = ColumnParallelLinear(hidden, ffn, bias=bias, tp=tp) if model.gated else None
        self.activation = model.activation
        self.up = ColumnParallelLinear(hidden, ffn, bias=bias, tp=tp)
        self.down = RowParallelLinear(ffn, hidden, bias=bias, tp=tp)
        self.multiplier = model.residual_multiplier

    def enter(self, x: Tensor) -> Tensor:
        """[s or s/tp, b, h] -> gate, where there is one, and up side by side, [s, b, ffn/tp or twice that]."""
        return self.up(x) if self.gate is None else column_parallel(x, self.gate, self.up)

    def activate(self, x: Tensor) -> Tensor:
        """What `enter` gives -> [s, b, ffn/tp]."""
        if self.activation == "gelu" or self.activation == "gelu_exact":
            return F.gelu(x, approximate="tanh" if self.activation == "gelu" else "none")
        return side_by_side(x, self.activation)

    def leave(self, x: Tensor, activated: Tensor) -> Tensor:
        """The residual stream [s or s/tp, b, h] and what `activate` gives -> the stream with the MLP's output."""
        return added(x, self.down(activated), self.multiplier)
