"""How far probabilities can be trusted: temperature and calibration error.

Pure functions of scores; ``calibrate`` applies them to a model's held-out episodes, fitted on one split and checked on
another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l2g_meta.errors import L2GError
from l2g_meta.evaluation.episodes import Evaluation, evaluate

BINS = 15  # of the calibration error, as Guo et al. (2017)
TEMPERATURES = (1e-3, 1e3)  # least and largest that are tried


def fit_temperature(scores: Tensor, y: Tensor) -> float:  # (n, n_way), (n,)
    r"""The temperature T that minimises the negative log-likelihood of :math:`\mathrm{softmax}(s / T)`.

    The loss is convex in β = 1/T, with the derivative :math:`\sum_i (\mathbb{E}_{p_i}[s_i] - s_{i, y_i})`, whose zero
    is found by bisection. T lies in ``TEMPERATURES``; the order of the classes does not change.

    Shapes: scores (n, n_way), y (n,) -> a float.

    Source:
        Guo, Pleiss, Sun & Weinberger, *On Calibration of Modern Neural Networks* (2017), section 4.2.

    Example:
        >>> scores = torch.tensor([[3.0, 0.0]]).expand(100, 2)
        >>> right_three_times_in_four = (torch.arange(100) % 4 == 0).long()
        >>> round(fit_temperature(scores, right_three_times_in_four), 3), round(3 / math.log(3), 3)
        (2.731, 2.731)
    """
    s = scores.double()
    own = s.gather(1, y[:, None])[:, 0]
    low, high = (-math.log(t) for t in reversed(TEMPERATURES))  # of log β
    for _ in range(60):
        middle = (low + high) / 2
        p = (s * math.exp(middle)).softmax(-1)
        too_sure = ((p * s).sum(-1) - own).mean() > 0
        low, high = (low, middle) if too_sure else (middle, high)
    return math.exp(-(low + high) / 2)


def expected_calibration_error(confidence: Tensor, correct: Tensor, *, bins: int = BINS) -> float:  # (n,), (n,)
    r"""Expected calibration error :math:`\sum_b \frac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b|`, in [0, 1].

    Predictions are put into bins of equal width by the probability of the predicted class.

    Shapes: confidence (n,), correct (n,) booleans -> a float.

    Source:
        Guo et al. (2017), eq. 3.

    Example:
        >>> round(expected_calibration_error(torch.tensor([0.9, 0.9]), torch.tensor([True, False])), 6)
        0.4
    """
    at = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1  # open at the left, as published
    gaps = torch.bincount(at, correct.double() - confidence.double(), bins)
    return gaps.abs().sum().item() / len(confidence)


def probabilities(scores: Tensor, temperature: float) -> Tensor:  # (n, n_way) -> (n, n_way)
    """Softmax of scores / temperature, in double precision.

    Example:
        >>> probabilities(torch.tensor([[0.0, 2 * math.log(3.0)]]), 2.0)
        tensor([[0.2500, 0.7500]], dtype=torch.float64)
    """
    return F.softmax(scores.double() / temperature, -1)


@dataclass(frozen=True)
class AtShots:
    """What held-out episodes with this many supports per class say.

    Args:
        shots: supports per class.
        temperature: fitted on validation episodes.
        ece_before: expected calibration error on test episodes with temperature 1, in [0, 1]; ``None``: not measured.
        ece_after: the same with ``temperature``.
        accuracy: on the same test episodes, in per cent.
        accuracy_ci95: half width of its 95% interval over episodes.
    """

    shots: int
    temperature: float
    ece_before: float | None = None
    ece_after: float | None = None
    accuracy: float | None = None
    accuracy_ci95: float | None = None


@dataclass(frozen=True)
class Calibration:
    """A model's temperatures, from held-out episodes.

    Args:
        ways: classes of those episodes.
        episodes: how many of each number of shots.
        shots: what they say, for each number of supports per class.
    """

    ways: int
    episodes: int
    shots: tuple[AtShots, ...]

    def at(self, shots: float) -> AtShots:
        """The entry for the number of supports per class that is nearest by ratio.

        Example:
            >>> both = Calibration(5, 100, (AtShots(1, 2.0), AtShots(5, 3.0)))
            >>> [both.at(n).shots for n in (1, 2, 3, 20)]
            [1, 1, 5, 5]
        """
        return min(self.shots, key=lambda entry: abs(math.log(entry.shots / shots)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Calibration:
        """From what ``dataclasses.asdict`` gave, through JSON.

        Raises:
            L2GError: if it is something else.
        """
        try:
            entries = tuple(AtShots(**entry) for entry in values["shots"])
            found = cls(int(values["ways"]), int(values["episodes"]), entries)
            sound = all(1 <= e.shots < 2**31 and 0 < e.temperature < math.inf for e in entries) and entries
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise L2GError(f"need a calibration, got: {error!r}; export the run again") from error
        if not sound:
            raise L2GError(f"need a calibration with temperatures above 0, got {str(values)[:200]}; export again")
        return found


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
    """Temperatures on episodes of validation classes, and the calibration error on test's.

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
