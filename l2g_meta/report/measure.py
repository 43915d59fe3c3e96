"""A trained run on episodes of a split: its accuracy, and what it said of every query."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l2g_meta.data.dataset import ClassDataset
from l2g_meta.data.pairs import Choice, Episodes, values
from l2g_meta.data.sources import TaskRows
from l2g_meta.errors import DataError
from l2g_meta.evaluation.episodes import Evaluation
from l2g_meta.evaluation.frozen import HEADS, TRAINED, evaluate_heads
from l2g_meta.models.batchnorm_policy import Policy
from l2g_meta.training.build import build_device, load_run
from l2g_meta.training.config import Config


@dataclass(frozen=True, eq=False)
class ReportOptions:
    """What a report measures.

    Args:
        split: ``"test"``, or another.
        episodes: of each run.
        ways: classes per episode; as trained by default, and so for the next two.
        shots: supports per class.
        queries: queries per class.
        bn: BatchNorm statistics, see ``batchnorm_policy``.
        episode_seed: of the episodes.
        classes: hard classes shown.
        root: folder of the data, if it has moved since training.
        device: another one than the run's.
        trust: as of ``load_run``.
    """

    split: str = "test"
    episodes: int = 600
    ways: Choice | None = None
    shots: Choice | None = None
    queries: int | None = None
    bn: Policy = "running"
    episode_seed: int = 0
    classes: int = 10
    root: str | None = None
    device: str | None = None
    trust: bool = False


@dataclass(frozen=True, eq=False)
class EpisodePredictions:
    """What a model said in one episode.

    Args:
        rows: of the episode's images.
        predicted: position of the predicted class among the episode's, (n_query,).
    """

    rows: TaskRows
    predicted: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Whether the prediction is right, (n_query,)."""
        return self.predicted == self.rows.query_y


@dataclass(frozen=True, eq=False)
class Measured:
    """A run's results on a split."""

    evaluation: Evaluation
    predictions: Sequence[EpisodePredictions]
    model: nn.Module
    data: ClassDataset
    shape: dict[str, Any]  # ways, shots and queries of the episodes
    frozen: dict[str, Evaluation] = field(default_factory=dict)  # by heads that need no training, same episodes

    def ranked(self) -> list[int]:
        """Episodes from the worst to the best; among equals the earlier first."""
        return np.argsort(self.evaluation.accuracies, kind="stable").tolist()


def measure(run: Path, options: ReportOptions, load: Callable[[Config, str], ClassDataset]) -> Measured:
    """Tests a run's best checkpoint.

    Args:
        run: its directory.
        options: of the report.
        load: a config's split, as ``build_data``; one that keeps what it loaded serves several runs.

    Raises:
        L2GError: if the checkpoint or the data is missing, damaged or does not fit.
    """
    wrapper, config = load_run(run, device=options.device, trust=options.trust)
    root, device = options.root or config.root, build_device(config.device)
    data_alone = Config(data=config.data, root=root, image_size=config.image_size, split_seed=config.split_seed)
    data = load(data_alone, options.split)  # seeds and methods share what is loaded
    shape: dict[str, Any] = {
        "ways": options.ways or config.outer_ways,
        "shots": options.shots or config.outer_shots,
        "queries": options.queries or config.queries,
    }
    base = None
    with suppress(DataError):  # without it SimpleShot takes the mean of an episode's supports
        base = load(data_alone, "train")
    found, predictions = _predict(wrapper.module, data, shape, options, device, (TRAINED, *HEADS), base)
    return Measured(found.pop(TRAINED), predictions, wrapper.module, data, shape, found)


def predictions_among(measured: Measured, data: ClassDataset, options: ReportOptions) -> list[EpisodePredictions]:
    """EpisodePredictions of a model that was tested, in as many episodes of other data: some of the classes alone."""
    ways = min(max(values(measured.shape["ways"])), data.n_classes)
    device = next((p.device for p in measured.model.parameters()), torch.device("cpu"))
    shape = measured.shape | {"ways": ways}
    return _predict(measured.model, data, shape, options, device)[1]


def _predict(
    model: nn.Module,
    data: ClassDataset,
    shape: dict[str, Any],
    options: ReportOptions,
    device: torch.device,
    heads: Collection[str] = (TRAINED,),
    base: ClassDataset | None = None,
) -> tuple[dict[str, Evaluation], list[EpisodePredictions]]:
    """Results by head, and what the trained one said."""
    observed: list[np.ndarray] = []

    def observe(scores: Tensor, y: Tensor) -> None:
        observed.append(scores.argmax(-1).cpu().numpy())

    found = evaluate_heads(
        model, data, heads=heads, base=base, **shape, episodes=options.episodes, bn=options.bn,
        episode_seed=options.episode_seed, device=device, observe=observe,
    )  # fmt: skip
    stream = Episodes(data, **shape, seed=(options.episode_seed, 0), device=torch.device("cpu"))
    return found, [EpisodePredictions(stream.rows(k), predicted) for k, predicted in enumerate(observed)]
