"""What a run says of itself while it trains: log.csv, a progress bar, TensorBoard events."""

from __future__ import annotations

import csv
from pathlib import Path
from types import TracebackType
from typing import Any

from l2g_meta.config import Config
from l2g_meta.errors import L2GError

COLUMNS = (
    "iteration",  # updates done
    "loss",  # outer loss, mean over the update's pairs
    "inner_loss",  # L(θ; T_i); empty for episodic
    "alignment",  # Σ α g_i g_j / L(θ'; T_j), see objectives.meta_gradient
    "lr",
    "tasks",  # tasks in the update
    "seconds",  # of the update, validation left out
    "val_accuracy",  # per cent; empty between validations
    "val_ci95",
    "val_loss",  # under θ, mean over episodes
)


class RunLog:
    """Writes one row per update; a context manager, which closes its files.

    Args:
        out: run directory.
        config: of the run.
        start: updates already done; later rows of an existing log are dropped.
        progress: show a progress bar on stderr.
    """

    def __init__(self, out: Path, config: Config, *, start: int = 0, progress: bool = True):
        from tqdm.auto import tqdm

        self.out, self.path = out, out / "log.csv"
        kept = [row for row in read_log(out) if int(row["iteration"]) <= start] if start else []
        partial = self.path.with_name(".log.csv.partial")
        with open(partial, "w", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writeheader()
            csv.DictWriter(file, COLUMNS).writerows(kept)
        partial.replace(self.path)
        self.file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115
        self.writer = csv.DictWriter(self.file, COLUMNS)
        self.bar = tqdm(
            total=config.iterations, initial=start, desc=f"{config.method} {out.name}", unit="update",
            disable=None if progress else True,
        )  # fmt: skip
        self.shown: dict[str, str] = {}
        self.board = None
        if config.tensorboard:
            self.board = require_tensorboard()(out / "tensorboard", purge_step=start + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Logs one update."""
        self.writer.writerow({k: "" if v != v else v for k, v in row.items()})  # NaN: no such thing here
        self.file.flush()
        self.shown |= {"loss": f"{row['loss']:.3f}", "tasks/s": f"{row['tasks'] / row['seconds']:.1f}"}
        if "val_accuracy" in row:
            self.shown["val"] = f"{row['val_accuracy']:.1f}%"
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()
        if self.board is not None:
            for name, value in row.items():
                if name != "iteration" and value == value:
                    self.board.add_scalar(name, value, row["iteration"])

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        self.bar.close()
        if self.board is not None:
            self.board.close()


def read_log(run: Path) -> list[dict[str, str]]:
    """Rows of a run's ``log.csv``.

    Raises:
        L2GError: if there is none.
    """
    try:
        with open(run / "log.csv", newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise L2GError(f"need a run's log in {run / 'log.csv'}, got: {error.strerror}") from error


def require_tensorboard() -> Any:
    """TensorBoard's ``SummaryWriter``.

    Raises:
        ImportError: with what to install.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs TensorBoard; pip install l2g-meta[tensorboard]") from error
    return SummaryWriter
