"""A trained run on episodes of a split: its accuracy, and what it said of every query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l2g_meta.data.dataset import ClassDataset
from l2g_meta.data.pairs import Choice, Episodes, values
from l2g_meta.data.sources import TaskRows
from l2g_meta.evaluation.episodes import Evaluation, evaluate
from l2g_meta.models.batchnorm_policy import Policy
from l2g_meta.report.run_facts import RunFolder
from l2g_meta.training.build import build_data, build_device, load_run
from l2g_meta.training.config import Config


@dataclass(frozen=True, eq=False)
class Asked:
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
class Answers:
    """What a model said in one episode.

    Args:
        rows: of the episode's images.
        predicted: position of the predicted class among the episode's, (n_query,).
        confidence: its probability, softmax of the scores, (n_query,).
    """

    rows: TaskRows
    predicted: np.ndarray
    confidence: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Whether the prediction is right, (n_query,)."""
        return self.predicted == self.rows.query_y


@dataclass(frozen=True, eq=False)
class Measured:
    """A run's results on a split."""

    evaluation: Evaluation
    answers: Sequence[Answers]
    model: nn.Module
    data: ClassDataset
    shape: dict[str, Any]  # ways, shots and queries of the episodes

    def ranked(self) -> list[int]:
        """Episodes from the worst to the best; among equals the earlier first."""
        return np.argsort(self.evaluation.accuracies, kind="stable").tolist()


class Splits:
    """Data sets, each loaded once."""

    def __init__(self) -> None:
        self.loaded: dict[tuple[Any, ...], ClassDataset] = {}

    def of(self, config: Config, asked: Asked) -> ClassDataset:
        """The split that a run is tested on."""
        config = replace(config, root=asked.root or config.root)
        key = (config.data, config.root, config.image_size, config.split_seed, asked.split)
        if key not in self.loaded:
            self.loaded[key] = build_data(config, asked.split)
        return self.loaded[key]


def measure(run: RunFolder, asked: Asked, splits: Splits) -> Measured:
    """Tests a run's best checkpoint.

    Raises:
        L2GError: if the checkpoint or the data is missing, damaged or does not fit.
    """
    wrapper, config = load_run(run.path, device=asked.device, trust=asked.trust)
    data, device = splits.of(config, asked), build_device(config.device)
    shape: dict[str, Any] = {
        "ways": asked.ways or config.outer_ways,
        "shots": asked.shots or config.outer_shots,
        "queries": asked.queries or config.queries,
    }
    evaluation, answers = _ask(wrapper, data, shape, asked, device)
    return Measured(evaluation, answers, wrapper.module, data, shape)


def among(measured: Measured, data: ClassDataset, asked: Asked) -> list[Answers]:
    """Answers of a model that was tested, in as many episodes of other data: some of the classes alone."""
    ways = min(max(values(measured.shape["ways"])), data.n_classes)
    device = next((p.device for p in measured.model.parameters()), torch.device("cpu"))
    shape = measured.shape | {"ways": ways}
    return _ask(measured.model, data, shape, asked, device)[1]


def _ask(
    model: nn.Module, data: ClassDataset, shape: dict[str, Any], asked: Asked, device: torch.device
) -> tuple[Evaluation, list[Answers]]:
    said: list[tuple[np.ndarray, np.ndarray]] = []

    def observe(scores: Tensor, y: Tensor) -> None:
        confidence, predicted = scores.double().softmax(-1).max(-1)
        said.append((predicted.cpu().numpy(), confidence.cpu().numpy()))

    evaluation = evaluate(
        model, data, **shape, episodes=asked.episodes, bn=asked.bn, episode_seed=asked.episode_seed,
        device=device, observe=observe,
    )  # fmt: skip
    stream = Episodes(data, **shape, seed=(asked.episode_seed, 0), device=torch.device("cpu"))
    return evaluation, [Answers(stream.rows(k), *both) for k, both in enumerate(said)]
