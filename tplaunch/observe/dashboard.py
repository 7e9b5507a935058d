"""A W&B workspace for the runs of a project, made by code (`wandb-workspaces`): one for all, or saved as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tplaunch.recipe.schema import Recipe
from tplaunch.spec.validation import validation_losses

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME = "tplaunch"
_TOKENS, _STEP = "train/tokens", "train/step"
_FIGURES = ("loss", "perplexity", "bits_per_byte")
_Plot = tuple[str, list[str]]  # title, and the metrics in it

# Sections of plots by the x-axis; what a run measures stands beside what its plan says (`plan/`).
LEARNING: list[_Plot] = [
    ("gradient norm", ["train/grad_norm"]),
    ("update / weight", ["train/update_ratio"]),
    ("norm of the weights", ["train/param_norm"]),
    ("learning rate", ["train/lr_decay", "train/lr_no_decay", "train/lr_muon"]),
]
EXPERTS: list[_Plot] = [
    ("load of the fullest expert / mean", ["moe/load_max"]),
    ("entropy of the load / even", ["moe/load_entropy"]),
    ("auxiliary loss, z-loss", ["moe/aux_loss", "moe/z_loss"]),
]
SPEED: list[_Plot] = [
    ("tokens/s a GPU, measured and predicted", ["throughput/tokens_per_s_per_gpu", "plan/tokens_per_s_per_gpu"]),
    ("MFU, measured and predicted", ["throughput/mfu", "plan/mfu"]),
    ("seconds a step, measured and predicted", ["throughput/step_time_s", "plan/step_seconds"]),
    ("where a step goes, s", [f"time/{part}_s" for part in ("data", "forward_backward", "gradients", "update")]),
    ("pipeline bubble, predicted", ["plan/bubble"]),
]
RELIABILITY: list[_Plot] = [
    ("attempt", ["train/attempt"]),
    ("skipped steps", ["train/skipped_steps"]),
    ("checkpoint: training stood still, s", ["checkpoint/stall_s"]),
    ("checkpoint: until complete, s", ["checkpoint/save_s"]),
]


def memory(recipe: Recipe) -> list[_Plot]:
    """The plots of memory: of the fullest rank, and of each pipeline rank's."""
    stages = [f"memory/pp{rank}_peak_gib" for rank in range(recipe.topology.pp)]
    return [
        ("fullest rank, GiB, measured and predicted", ["memory/peak_gib", "plan/memory_gib"]),
        ("by stage, GiB", stages),
    ]


def learning(recipe: Recipe) -> list[_Plot]:
    """The plots of what is learnt: the losses together, and what follows from those of validation."""
    known = validation_losses(recipe) or ["validation/loss"]
    loss, perplexity, bits = ([key.removesuffix("loss") + figure for key in known] for figure in _FIGURES)
    plots = [("loss", ["train/loss", *loss]), ("validation perplexity", perplexity), ("bits per byte", bits)]
    return [*plots, *LEARNING]


def make_workspace(recipe: Recipe) -> Workspace:
    """The workspace of a recipe's project.

    Raises:
        ImportError: wandb-workspaces is not installed.
    """
    from wandb_workspaces.reports.v2.interface import LinePlot, MediaBrowser
    from wandb_workspaces.workspaces import Section, Workspace

    def section(name: str, axis: str, plots: list[_Plot]) -> Section:
        panels: list[Any] = [LinePlot(title=title, x=axis, y=list(metrics)) for title, metrics in plots]
        return Section(name=name, panels=panels, is_open=True)

    maps = MediaBrowser(title="memory, forward and backward, data, by rank", media_keys=["rank/heat_maps"])
    table = MediaBrowser(title="ranks", media_keys=["rank/table"])
    sections = [
        section("Learning, by tokens", _TOKENS, learning(recipe)),
        *([] if recipe.model.moe is None else [section("Experts, by tokens", _TOKENS, EXPERTS)]),
        section("Speed", _STEP, SPEED),
        section("Memory", _STEP, memory(recipe)),
        section("Reliability", _STEP, RELIABILITY),
        Section(name="Ranks", panels=[maps, table], is_open=True),
    ]
    wandb = recipe.logging.wandb
    return Workspace(entity=wandb.entity or "", project=wandb.project, name=NAME, sections=sections)


def to_json(workspace: Workspace) -> str:
    """What W&B keeps of a workspace. The package has no public way to say it."""
    return workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True, indent=2)
