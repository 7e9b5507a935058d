"""What a checkpoint says of the model in it, and where its tokenizer is. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tplaunch.checkpoint.store import find_checkpoints, open_checkpoint
from tplaunch.data.beside import TOKENIZER
from tplaunch.data.corpus import tokenizer_path
from tplaunch.errors import Problem, TplaunchError
from tplaunch.recipe.load import load_recipe
from tplaunch.recipe.schema import Data, Model, Precision
from tplaunch.run.directory import RunDir
from tplaunch.spec.run_stages import segment_after


@dataclass(frozen=True)
class Origin:
    """A checkpoint and what it came from.

    Args:
        checkpoint: its directory.
        model: the model.
        seq_len: positions that it was trained on.
        precision: that it was trained in.
        tokenizer: a tokenizer.json, where one is found.
        step: at which it was written.
        run: that wrote it, where it lies in a run's directory.
        document_mask: whether that run kept the documents of a sample apart.
        ema: its averaged weights are meant.
        adapters: it holds adapters alone.
    """

    checkpoint: Path
    model: Model
    seq_len: int
    precision: Precision
    tokenizer: Path | None
    step: int = 0
    run: RunDir | None = None
    document_mask: bool = False
    ema: bool = False
    adapters: bool = False


def origin_of(path: Path, *, ema: bool = False) -> Origin:
    """Of a checkpoint, or of a run's newest; see `find_checkpoints`.

    Args:
        ema: its averaged weights are wanted.

    Raises:
        TplaunchError: there is no checkpoint, its manifest is damaged, or it would have us run code; or it has no
            averaged weights.
    """
    checkpoint = find_checkpoints(path)[-1]
    manifest = open_checkpoint(checkpoint)
    about = manifest.about
    if ema and not (about.get("ema") and manifest.state["progress"].get("averaged")):
        why = "its averages had not begun" if about.get("ema") else "it was written without training.ema"
        raise TplaunchError(Problem(f"{checkpoint} has no averaged weights", why=why, fix="leave out --ema"))
    folder = checkpoint.absolute().parent
    tokenizers = [checkpoint / TOKENIZER, folder / TOKENIZER]  # where `tplaunch import` puts it
    run, document_mask = RunDir(folder.parent), False
    if run.recipe.exists():
        recipe = load_recipe(run.recipe).recipe
        about = {"seq_len": recipe.training.seq_len, "precision": recipe.training.precision, **about}
        tokenizers += _tokenizers(recipe.data)
        document_mask = segment_after(recipe, max(0, manifest.step - 1)).recipe.training.document_mask
    tokenizer = next((place for place in tokenizers if place.exists()), None)
    model = Model.model_validate(about["model"])
    return Origin(
        checkpoint,
        model,
        about["seq_len"],
        about["precision"],
        tokenizer,
        step=manifest.step,
        run=run if run.recipe.exists() else None,
        document_mask=document_mask,
        ema=ema,
        adapters="base" in about,
    )


def _tokenizers(data: Data) -> list[Path]:
    """Where a run's tokenizer may be: the file it names, or beside its token files."""
    named = [Path(data.tokenizer)] if isinstance(data.tokenizer, str) else []
    return [*named, *(tokenizer_path(Path(source.path)) for source in data.sources("train"))]
