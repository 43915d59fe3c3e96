"""Scores of images against labelled supports, whose features are computed once and kept."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2g_meta.errors import FitError
from l2g_meta.evaluation.episodes import scores_from_embeddings
from l2g_meta.models import functional as f
from l2g_meta.models.batchnorm_policy import batchnorm_policy
from l2g_meta.models.heads import FullContextMatchingHead, MatchingHead
from l2g_meta.models.metric import MetricModel
from l2g_meta.models.relation_network import RelationHead
from l2g_meta.task import Task

PAIRS = 2**22  # numbers in one table of differences, query by class by dimension
CACHE = 2**26  # numbers that ``embed`` remembers, a quarter of a gigabyte
_features: OrderedDict[bytes, Tensor] = OrderedDict()  # by encoder and image


@dataclass(frozen=True, eq=False)
class Supports:
    """Labelled examples of the classes, as features or, where a model scores tasks as a whole, as inputs.

    Args:
        model: ``model(task) -> scores``.
        z: features of the supports for a ``MetricModel``, else their inputs, (n_support, ...).
        y: their classes, (n_support,), 0 … n_way − 1.
        n_way: classes, each with a support.
    """

    model: nn.Module
    z: Tensor
    y: Tensor
    n_way: int

    def scores(self, query: Tensor) -> Tensor:  # (n_query, ...) -> (n_query, n_way)
        """Scores of queries, given as the supports are, under running statistics and without gradients.

        With unequal numbers of supports a class is not favoured for having more of them: see ``_balanced``.

        Raises:
            FitError: if the model does not take so many classes.
        """
        model, z, y = self.model, self.z, self.y
        with torch.no_grad(), batchnorm_policy(model, "running"):
            if not scores_from_embeddings(model):
                zeros = torch.zeros(len(query), dtype=torch.long, device=y.device)
                return model(Task(z, y, query, zeros, self.n_way))
            rows = max(1, PAIRS // max(1, self.n_way * z[0].numel()))
            return torch.cat([_balanced(model, z, y, part, self.n_way) for part in query.split(rows)])

    def nearest(self, query: Tensor) -> Tensor | None:  # (n_query, ...) -> (n_query,)
        """The support that scores highest for each query when each is a class of its own; ``None``: not known.

        So it is nearest in the head's own sense. A model that scores tasks as a whole may have a limit of classes.
        """
        if not scores_from_embeddings(self.model):
            return None
        each = torch.arange(len(self.z), device=self.y.device)
        return replace(self, y=each, n_way=len(each)).scores(query).argmax(-1)


def embed(model: nn.Module, x: Tensor, token: bytes = b"") -> Tensor:
    """What ``Supports`` keeps of inputs (n, ...): a ``MetricModel``'s features, else the inputs themselves.

    Features of the last ``CACHE`` numbers are remembered, by the images' content, for each ``token``.

    Args:
        model: in evaluation mode.
        x: inputs.
        token: at most 64 bytes that stand for the encoder and its weights; without them nothing is remembered.
    """
    if not scores_from_embeddings(model):
        return x
    if not token:
        return model.encoder(x).to(x.dtype)
    token = hashlib.sha256(token + f"{x.dtype} {x.device}".encode()).digest()
    keys = [hashlib.blake2b(row.tobytes(), digest_size=16, key=token).digest() for row in x.cpu().numpy()]
    found = {key: _features[key] for key in keys if key in _features}
    if new := [key for key in dict.fromkeys(keys) if key not in found]:
        z = model.encoder(x[[keys.index(key) for key in new]]).to(x.dtype)
        found |= zip(new, z.unbind(), strict=True)
        _features.update((key, found[key]) for key in new)
        while len(_features) * z[0].numel() > CACHE:
            _features.popitem(last=False)
    return torch.stack([found[key] for key in keys])


def check_inductive(model: nn.Module) -> None:
    """That an image's scores depend on no other query.

    Raises:
        FitError: for BatchNorm layers without running statistics.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise FitError(
                f"need BatchNorm layers with running statistics, {name or 'the model'} has none: the prediction for an "
                "image would depend on the others of its batch; build them with track_running_stats=True, train again"
            )


def _balanced(model: MetricModel, support: Tensor, y: Tensor, query: Tensor, n_way: int) -> Tensor:
    """A head's scores, as of equally many supports of each class where they are not.

    Prototypes are means already. The Relation Network sums the maps of a class (eq. 9): each sum is scaled to the
    average number. Matching Networks sum the attention to a class's supports: the mean is taken.
    """
    counts = torch.bincount(y, minlength=n_way)
    if isinstance(model.head, RelationHead) and counts.max() > counts.min():
        average = counts.to(support.dtype).mean() / counts[:, None]
        maps = (f.class_sums(support, y, n_way).flatten(1) * average).view(n_way, *support.shape[1:])
        return model.score(maps, torch.arange(n_way, device=y.device), query, n_way)
    scores = model.score(support, y, query, n_way)
    if isinstance(model.head, MatchingHead | FullContextMatchingHead) and counts.max() > counts.min():
        return scores - counts.to(scores.dtype).log()
    return scores
