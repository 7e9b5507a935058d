"""How evenly the tokens of a step went to the experts of each layer: kept even by the router's corrections, and told.

Counts are of the whole global batch: of a microbatch or a rank they would make the run depend on the topology.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from tplaunch.model.build import Stage
from tplaunch.model.moe import MoE
from tplaunch.parallel.mesh import Mesh
from tplaunch.recipe.schema import Recipe
from tplaunch.spec.course import Course


class Balance:
    """The routers of one rank's stages; every rank makes one and calls the same methods.

    Args:
        stages: this rank's.
        mesh: the mesh.
        recipe: the recipe.
        course: of the run.
    """

    def __init__(self, stages: list[Stage], mesh: Mesh, recipe: Recipe, course: Course) -> None:
        self.mesh, self.recipe, self.course = mesh, recipe, course
        found: dict[int, MoE] = {}
        for stage in stages:
            for number, block in stage.module.layers.items():
                if isinstance(moe := block.moe, MoE):
                    found[int(number)] = moe
        self.layers = dict(sorted(found.items()))
        self._sequences = 1  # of the step's global batch

    def begin_step(self, step: int, loss_scale: float) -> None:
        """Called before the passes of a step."""
        self._sequences = self.course.batch_size(step)
        for moe in self.layers.values():
            moe.begin_step(loss_scale / self._sequences)

    @torch.no_grad()
    def update(self) -> None:
        """Called when a step's update was made: move each correction by a fixed rate, up where the expert had fewer
        tokens than the mean, and down where it had more (Wang et al. 2024, arXiv 2408.15664). Beside adapters
        routers are frozen, and so are their corrections."""
        spec = self.recipe.model.moe
        if (
            spec is None
            or not spec.bias_rate
            or self.recipe.lora is not None
            or not self.layers
            or self.mesh.experts is None
        ):
            return
        counts = torch.stack([self._counts(moe) for moe in self.layers.values()])
        dist.all_reduce(counts, group=self.mesh.experts.stage)
        signs = (counts.sum(-1, keepdim=True) - counts * spec.experts).sign()
        for moe, sign in zip(self.layers.values(), signs, strict=True):
            correction = moe.router.correction
            assert correction is not None
            correction += spec.bias_rate * sign

    def measure(self) -> dict[str, float]:
        """What the routers did in the last step: on every rank, of all layers. One all-reduce; {} without experts.

        Returns:
            `moe/load_max`, the load of the fullest expert of any layer over the mean; `moe/load_entropy`, the entropy
            of a layer's load over that of an even one, the mean of layers; `moe/dropped`, choices that no expert has
            counted, of which there are none; `moe/aux_loss` and `moe/z_loss`, where the recipe has them, as they are
            added to the loss: sums over layers. All but `dropped` of each layer, too, and the range of its corrections:
            `moe/layer_3/load_max`, ..., `moe/layer_3/bias_min`.
        """
        model = self.recipe.model
        if model.moe is None:
            return {}
        experts = model.moe.experts
        table = torch.zeros(model.num_layers, 2 * experts + 2, dtype=torch.float64, device=self.mesh.device)
        first = self.mesh.coordinates[:3] == (0, 0, 0)  # of the ranks that hold the same corrections
        for number, moe in self.layers.items():
            table[number, :experts] = self._counts(moe)
            if moe.losses is not None:
                table[number, experts : experts + 2] = moe.losses / self._sequences
            if first and moe.router.correction is not None:
                table[number, experts + 2 :] = moe.router.correction
        dist.all_reduce(table)
        rows = {n: row for n, row in enumerate(table.tolist()) if model.has_experts(n)}
        layers = {
            n: self._figures(row[:experts], row[experts : experts + 2], row[experts + 2 :]) for n, row in rows.items()
        }
        chosen = self._sequences * self.recipe.training.seq_len * model.moe.top_k
        whole = {
            "load_max": max(layer["load_max"] for layer in layers.values()),
            "load_entropy": sum(layer["load_entropy"] for layer in layers.values()) / len(layers),
            "dropped": sum(chosen - sum(row[:experts]) for row in rows.values()),
        }
        for key, factor in (("aux_loss", model.moe.aux_loss), ("z_loss", model.moe.z_loss)):
            if factor:
                whole[key] = sum(layer[key] for layer in layers.values())
        found = {f"moe/{key}": figure for key, figure in whole.items()}
        for number, layer in layers.items():
            found |= {f"moe/layer_{number}/{key}": figure for key, figure in layer.items()}
        return found

    def _figures(self, counts: list[float], losses: list[float], corrections: list[float]) -> dict[str, float]:
        """Of a layer, in a whole step."""
        spec = self.recipe.model.moe
        assert spec is not None
        total = sum(counts) or 1.0
        entropy = -sum(count / total * math.log(count / total) for count in counts if count)
        found = {
            "load_max": max(counts) * spec.experts / total,
            "load_entropy": entropy / math.log(spec.experts) if spec.experts > 1 else 1.0,
        }
        if spec.aux_loss:
            found["aux_loss"] = losses[0]
        if spec.z_loss:
            found["z_loss"] = losses[1]
        if spec.bias_rate is not None:
            found |= {"bias_min": min(corrections), "bias_max": max(corrections)}
        return found

    def _counts(self, moe: MoE) -> Tensor:
        if moe.counts is None:
            return torch.zeros(moe.spec.experts, dtype=torch.int64, device=self.mesh.device)
        return moe.counts
