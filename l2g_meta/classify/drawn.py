"""A model's calibration from held-out episodes: fitted on one split, checked on another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from l2g_meta.classify.calibration import (
    AtShots,
    Calibration,
    expected_calibration_error,
    fit_temperature,
    probabilities,
    quantiles,
)
from l2g_meta.evaluation.episodes import Evaluation, evaluate


def calibrate(
    model: nn.Module,
    validation: Any,
    test: Any = None,
    *,
    ways: int = 5,
    shots: tuple[int, ...] = (1, 5),
    queries: int = 15,
    episodes: int = 600,
    device: torch.device | str | None = None,
) -> Calibration:
    """Temperature and scores of known images on episodes of validation classes, and the calibration error on test's.

    Nothing of the test split is fitted. Running statistics are used, as ``FewShotClassifier`` does.

    Args:
        model: ``model(task) -> scores``, not its wrapper.
        validation: data set to fit on, as for ``TaskPairs``.
        test: data set to measure on; without one nothing is measured.
        ways: classes of an episode.
        shots: numbers of supports per class to calibrate for.
        queries: queries per class.
        episodes: for each number of shots, on each split.
        device: where the model is.

    Raises:
        DataError: if a split has too few classes or images.
    """
    options: dict[str, Any] = {"ways": ways, "queries": queries, "episodes": episodes, "device": device}
    entries = []
    for k in shots:
        _, scores, y = _evaluated(model, validation, shots=k, **options)
        entry: dict[str, Any] = {"shots": k, "temperature": fit_temperature(scores, y)}
        entry["known"] = quantiles(scores.max(-1).values)
        if test is not None:
            result, scores, y = _evaluated(model, test, shots=k, **options)
            entry |= {"accuracy": result.accuracy_mean, "accuracy_ci95": result.ci95_episodes}
            entry["ece_before"] = calibration_error(scores, y, 1.0)
            entry["ece_after"] = calibration_error(scores, y, entry["temperature"])
        entries.append(AtShots(**entry))
    return Calibration(ways, episodes, tuple(entries))


def calibration_error(scores: Tensor, y: Tensor, temperature: float) -> float:
    """Expected calibration error of scores (n, n_way) for labels (n,).

    Example:
        >>> calibration_error(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), 1.0)
        0.5
    """
    confidence, predicted = probabilities(scores, temperature).max(-1)
    return expected_calibration_error(confidence, predicted == y)


def _evaluated(model: nn.Module, data: Any, **options: Any) -> tuple[Evaluation, Tensor, Tensor]:
    """The evaluation, and the scores (n, n_way) and labels (n,) of all its episodes."""
    parts: list[tuple[Tensor, Tensor]] = []
    result = evaluate(model, data, **options, observe=lambda scores, y: parts.append((scores, y)))
    return result, torch.cat([scores for scores, _ in parts]).cpu(), torch.cat([y for _, y in parts]).cpu()
