"""TensorBoard as a second reader of the metric records; its files lie under `tensorboard/` of the run directory."""

from __future__ import annotations

from tplaunch.observe.mirror import Mirror, grouped
from tplaunch.run.directory import RunDir
from tplaunch.run.events import TensorboardFailed

FINISH_TIMEOUT_S = 10.0
FLUSH_S = 10  # that a record may wait in memory


class TensorboardLog(Mirror):
    """Writes the figures of records as scalars, and texts; used by one rank. No method raises.

    Args:
        run_dir: an existing run directory.
        step: after which the run goes on. TensorBoard then leaves out what earlier files say of later steps, so that a
            resumed run is one curve.
    """

    def __init__(self, run_dir: RunDir, step: int) -> None:
        super().__init__()
        self._run_dir, self._folder, self._step = run_dir, str(run_dir.tensorboard), step
        self._start("tensorboard")

    def finish(self, timeout_s: float = FINISH_TIMEOUT_S) -> None:
        """Write what is queued, within `timeout_s`."""
        self._end(timeout_s)

    def _mirror(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter

            purge = self._step + 1 if self._step else None
            writer = SummaryWriter(self._folder, purge_step=purge, flush_secs=FLUSH_S)
            while (entry := self._next()) is not None:
                record = entry.record
                for number, text in enumerate(entry.texts):
                    writer.add_text(f"samples/{number}", _verbatim(text["prompt"] + text["text"]), record["step"])
                for name, value in grouped(record).items():
                    if isinstance(value, (int, float)):
                        writer.add_scalar(name, value, record["step"], record.get("time"))
            writer.close()
        except Exception as error:  # a full disk: a mirror must never bring the trainer down
            self._run_dir.append(TensorboardFailed(f"{type(error).__name__}: {error}"[:500]))


def _verbatim(text: str) -> str:
    """A text as Markdown that shows it as it is."""
    return "\n".join(f"    {line}" for line in text.splitlines())
