"""The paper's protocol: accuracy over episodes of unseen classes, with 95% confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2g_meta.algorithm import L2GWrapper, Learner
from l2g_meta.data.dataset import ClassDataset
from l2g_meta.data.host import placed
from l2g_meta.data.pairs import Choice, Episodes, listed
from l2g_meta.data.sources import IndexedSource, TaskRows
from l2g_meta.errors import FitError, L2GError
from l2g_meta.evaluation.world import World, gathered
from l2g_meta.inner.compiled import unwrapped
from l2g_meta.inner.scores import evaluated, loss_fn_of
from l2g_meta.models import functional as f
from l2g_meta.models.batchnorm_policy import Policy, batchnorm_policy
from l2g_meta.models.metric import MetricModel

EMBED_BATCH = 256  # images in one forward pass
EMBED_PIXELS = 2**22  # pixels in one forward pass of several images: 64 of 256 x 256
EMBED_BYTES = 4 * 2**30  # features kept at once; beyond, each episode is embedded on its own


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of one model, in per cent, over ``runs`` streams of ``episodes`` episodes.

    Args:
        accuracy_mean: mean over all episodes.
        ci95_episodes: half width of its 95% interval over all episodes: how well these episodes measure this model
            (of several models: their mean, episode by episode).
        ci95_runs: half width over trained models (Student t over run means), the paper's; ``None`` for one model.
        run_means: mean of each stream, or of each trained model.
        accuracies: of every episode, (models · runs · episodes,).
        loss_mean: mean loss over all episodes, the model's own.
    """

    accuracy_mean: float
    ci95_episodes: float
    ci95_runs: float | None
    bn: Policy
    split: str
    ways: Choice
    shots: Choice
    queries: int
    episodes: int
    runs: int
    episode_seed: int
    run_means: list[float]
    accuracies: list[float] = field(repr=False)
    loss_mean: float = math.nan

    def __str__(self) -> str:
        """One line that says what the intervals are over."""
        shape = f"{listed(self.ways)}-way {listed(self.shots)}-shot"
        setting = [shape, f"{self.queries} queries", self.split, f"BatchNorm {self.bn}"]
        n = self.runs * self.episodes
        interval = f"± {self.ci95_episodes:.2f} % (95% over {n} episodes" if n > 1 else "% (one episode"
        head = f"{', '.join(filter(None, setting))}: {self.accuracy_mean:.2f} {interval}"
        if self.ci95_runs is not None:
            return head + f"; ± {self.ci95_runs:.2f} over {len(self.run_means)} trained models, Student t)"
        return head + (f", {self.runs} streams of one model)" if self.runs > 1 else ", one model)")


def evaluate(
    model: nn.Module,
    dataset: Any,
    *,
    ways: Choice = 5,
    shots: Choice = 1,
    queries: int = 15,
    episodes: int = 600,
    runs: int = 1,
    bn: Policy = "running",
    episode_seed: int = 0,
    device: torch.device | str | None = None,
    split: str | None = None,
    world: World | None = None,
    observe: Callable[[Tensor, Tensor], object] | None = None,
) -> Evaluation:
    """Accuracy of ``model(task)`` on episodes that depend on ``episode_seed`` alone.

    A metric model classifies under θ, without an inner step; one that adapts on the supports does so.

    Every model sees the same episodes, so differences between methods can be paired. Under ``bn="running"`` a
    ``MetricModel`` embeds each image once and episodes are drawn from the embeddings, which takes an encoder whose
    output for an image depends on that image alone. Modes, buffers and generators are as before afterwards.

    Args:
        model: ``model(task) -> scores``, or its wrapper.
        dataset: as for ``TaskPairs``.
        ways: classes per episode, or several numbers to draw from for each.
        shots: supports per class, or several.
        queries: queries per class.
        episodes: per stream; the paper takes 600.
        runs: streams of episodes.
        bn: BatchNorm statistics, see ``batchnorm_policy``.
        episode_seed: of the episodes.
        device: where the model is.
        split: name of the split in the result; the data set's own by default.
        world: processes that share the episodes; each returns the whole result.
        observe: called with scores (n_query, n_way) and labels (n_query,) of each episode of this process, in turn.

    Raises:
        DataError: if the split has too few classes or images.
        FitError: if the model takes no tasks, or its scores are not (n_query, n_way).
        L2GError: if scores are NaN, or there is nothing to evaluate on.

    Example:
        >>> from l2g_meta import Conv4, MetricModel, PrototypicalHead
        >>> data = ClassDataset(torch.randn(40, 1, 16, 16), torch.arange(40) // 8, split="test")
        >>> result = evaluate(MetricModel(Conv4(1, 8), PrototypicalHead()), data, ways=3, queries=5, episodes=20)
        >>> 0 <= result.accuracy_mean <= 100, result.ci95_runs
        (True, None)
    """
    if not isinstance(model, nn.Module):
        remedy = "take learner.module" if isinstance(model, Learner) else "a class is called first: Model()"
        raise FitError(f"need a model to evaluate, an nn.Module, got {model!r}; {remedy}")
    bare = unwrapped(model)  # of torch.compile(l2g)
    loss_fn, model = loss_fn_of(bare), bare.module if isinstance(bare, L2GWrapper) else model
    if episodes < 1 or runs < 1:
        raise L2GError(f"need at least 1 episode and 1 run, got episodes={episodes}, runs={runs}")
    dataset = placed(dataset, device) if isinstance(dataset, ClassDataset) else dataset
    streams = [
        Episodes(dataset, ways=ways, shots=shots, queries=queries, seed=(episode_seed, run), device=device)
        for run in range(runs)
    ]
    world = world or World()
    share = world.share(runs * episodes)
    scored = []
    with torch.no_grad(), batchnorm_policy(model, bn):
        for scores, y in _scores(model, streams, [divmod(i, episodes) for i in share], bn):
            scored.append(torch.stack([_accuracy(scores, y), loss_fn(scores, y).double()]))
            if observe is not None:
                observe(scores, y)
    accuracy, losses = gathered(world, scored, share, runs * episodes).T
    accuracies: list[float] = (100 * accuracy).tolist()
    return Evaluation(
        accuracy_mean=float(np.mean(accuracies)),
        ci95_episodes=f.confidence_interval(accuracies),
        ci95_runs=None,
        bn=bn,
        split=split if split is not None else getattr(dataset, "split", ""),
        ways=ways,
        shots=shots,
        queries=queries,
        episodes=episodes,
        runs=runs,
        episode_seed=episode_seed,
        run_means=np.mean(np.reshape(accuracies, (runs, episodes)), axis=1).tolist(),
        accuracies=accuracies,
        loss_mean=losses.mean().item(),
    )


def over_models(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Several trained models (seeds) as one result: the interval over run means is the paper's ± figure.

    Raises:
        L2GError: if they did not see the same episodes.

    Example:
        >>> a = Evaluation(50.0, 1.0, None, "running", "test", 5, 1, 15, 2, 1, 0, [50.0], [40.0, 60.0])
        >>> b = Evaluation(52.0, 1.0, None, "running", "test", 5, 1, 15, 2, 1, 0, [52.0], [42.0, 62.0])
        >>> both = over_models([a, b])
        >>> both.accuracy_mean, round(both.ci95_runs, 1)
        (51.0, 12.7)
    """
    first = evaluations[0]
    for other in evaluations:
        _check_same_episodes(first, other)
        if other.bn != first.bn:
            raise L2GError(f"need one BatchNorm policy, got {first.bn} and {other.bn}; evaluate both alike")
    means = [e.accuracy_mean for e in evaluations]
    accuracies = [a for e in evaluations for a in e.accuracies]
    return replace(
        first,
        accuracy_mean=float(np.mean(means)),
        ci95_episodes=f.confidence_interval(np.mean([e.accuracies for e in evaluations], axis=0).tolist()),
        ci95_runs=f.confidence_interval(means),
        run_means=means,
        accuracies=accuracies,
        loss_mean=float(np.mean([e.loss_mean for e in evaluations])),
    )


def paired_difference(a: Evaluation, b: Evaluation) -> tuple[float, float]:
    """Mean of a − b over the same episodes, in points, and its 95% half width over episodes.

    Where a side is several trained models, their mean per episode counts; what other seeds would give is not in it.

    Raises:
        L2GError: if the two did not see the same episodes.

    Example:
        >>> a = Evaluation(50.0, 1.0, None, "running", "test", 5, 1, 15, 2, 1, 0, [50.0], [40.0, 60.0])
        >>> b = Evaluation(48.0, 1.0, None, "running", "test", 5, 1, 15, 2, 1, 0, [48.0], [38.0, 58.0])
        >>> paired_difference(a, b)
        (2.0, 0.0)
    """
    _check_same_episodes(a, b)
    episodes = a.runs * a.episodes  # models of one side are averaged: they share the episodes
    difference = np.reshape(a.accuracies, (-1, episodes)).mean(0) - np.reshape(b.accuracies, (-1, episodes)).mean(0)
    return float(difference.mean()), f.confidence_interval(difference.tolist())


def _accuracy(scores: Tensor, y: Tensor) -> Tensor:
    if scores.isnan().any():
        raise L2GError(
            "need scores that are numbers, got NaN: the model's weights are not finite or blow up; train with a "
            "lower --lr or --inner-lr"
        )
    return f.accuracy(scores, y)


def _check_same_episodes(a: Evaluation, b: Evaluation) -> None:
    for name in ("split", "ways", "shots", "queries", "episodes", "runs", "episode_seed"):
        if getattr(a, name) != getattr(b, name):
            raise L2GError(
                f"need the same {name} of both, got {getattr(a, name)} and {getattr(b, name)}; evaluate them alike"
            )


def _scores(
    model: nn.Module, streams: Sequence[Episodes], which: Sequence[tuple[int, int]], bn: Policy
) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores (n_query, n_way) and labels (n_query,) of episodes, given as stream and position."""
    source = streams[0].source
    if not which:  # more processes than episodes
        return
    if bn == "running" and isinstance(source, IndexedSource) and scores_from_embeddings(model):
        drawn = [streams[run].rows(k) for run, k in which]
        data, device = source.dataset, streams[0].device
        features = _embeddings(model, data, drawn, device, EMBED_BYTES)
        for rows in drawn:
            yield _from_embeddings(model, features or _embeddings(model, data, [rows], device), rows)
        return
    for run, k in which:
        task = streams[run][k]
        yield evaluated(model, task), task.query_y


def scores_from_embeddings(model: nn.Module) -> TypeGuard[MetricModel]:
    """Whether scores depend on each image's own embedding alone: a plain ``MetricModel`` with running statistics."""
    plain = type(model).forward is MetricModel.forward and getattr(type(model), "score", None) is MetricModel.score
    return plain and not any(isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules())


def at_once(most: int, image_shape: Sequence[int]) -> int:
    """Images of a shape (C, H, W) in one forward pass: ``most``, but of large ones fewer, which bounds the memory.

    Example:
        >>> at_once(64, (3, 224, 224)), at_once(64, (3, 1024, 1024)), at_once(64, (5,))
        (64, 4, 64)
    """
    return min(most, max(1, EMBED_PIXELS // math.prod(image_shape[1:])))


def inputs_of(dataset: Any, rows: np.ndarray) -> Iterator[Tensor]:
    """Inputs of a data set's rows (n,), one forward pass after the other: (n_k, ...)."""
    known = hasattr(dataset, "image_shape")
    size = at_once(EMBED_BATCH, dataset.image_shape if known else dataset.gather(torch.from_numpy(rows[:1])).shape[1:])
    return (dataset.gather(torch.from_numpy(rows[start : start + size])) for start in range(0, len(rows), size))


def _embeddings(model: MetricModel, data: Any, drawn: Sequence[TaskRows], device: Any, most: float = math.inf) -> Any:
    """The rows that the episodes use, ascending, and their features (n, ...); ``None`` if these take more bytes."""
    used = np.unique(np.concatenate([np.concatenate([rows.support, rows.query]) for rows in drawn]))
    chunks: list[Tensor] = []
    for x in inputs_of(data, used):
        chunks.append(model.encoder(x.to(device)))
        if chunks[0][0].numel() * chunks[0].element_size() * len(used) > most:
            return None
    return used, torch.cat(chunks)


def _from_embeddings(model: MetricModel, features: tuple[np.ndarray, Tensor], rows: TaskRows) -> tuple[Tensor, Tensor]:
    used, z = features
    places = (np.searchsorted(used, part) for part in (rows.support, rows.query))
    support, query = (z[torch.from_numpy(part).to(z.device)] for part in places)
    support_y, query_y = (torch.from_numpy(y).to(z.device) for y in (rows.support_y, rows.query_y))
    return model.score(support, support_y, query, len(rows.classes)), query_y
