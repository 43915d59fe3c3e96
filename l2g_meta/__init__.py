"""Few-shot classifiers that generalise to unseen classes: bilevel metric learning (L2G) for PyTorch and learn2learn."""

import sys

# `python -m l2g_meta` puts the current folder first: a typing.py in a folder of data would run with the next import. A
# checkout that is not installed is run from itself; it stays, as the last.
_safe = sys.flags.isolated or getattr(sys.flags, "safe_path", False)  # python -I, and from 3.11 on python -P
if sys.argv[:1] == ["-m"] and "l2g_meta" in sys.orig_argv and not _safe:
    _here = sys.path.pop(0)
    if __path__[0].startswith(_here) and __path__[0][len(_here) + 1 :] == "l2g_meta":
        sys.path.append(_here)

from importlib import import_module  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from l2g_meta.algorithm import L2GWrapper as L2GWrapper
    from l2g_meta.classify.classifier import FewShotClassifier as FewShotClassifier
    from l2g_meta.data import Episodes as Episodes
    from l2g_meta.data import TaskPairs as TaskPairs
    from l2g_meta.data import load as load
    from l2g_meta.evaluation.episodes import evaluate as evaluate
    from l2g_meta.evaluation.episodes import paired_difference as paired_difference
    from l2g_meta.models.backbones import Conv4 as Conv4
    from l2g_meta.models.backbones import ResNet12 as ResNet12
    from l2g_meta.models.backbones import relation_embedding as relation_embedding
    from l2g_meta.models.batchnorm_policy import batchnorm_policy as batchnorm_policy
    from l2g_meta.models.heads import FullContextMatchingHead as FullContextMatchingHead
    from l2g_meta.models.heads import MatchingHead as MatchingHead
    from l2g_meta.models.heads import PrototypicalHead as PrototypicalHead
    from l2g_meta.models.metric import MetricModel as MetricModel
    from l2g_meta.models.relation_network import RelationHead as RelationHead
    from l2g_meta.task import Task as Task
    from l2g_meta.testing import check_head as check_head
    from l2g_meta.training.build import load_run as load_run
    from l2g_meta.training.config import Config as Config
    from l2g_meta.training.loop import train as train

__version__ = "0.2.0"
__all__ = [
    "Config",
    "Conv4",
    "Episodes",
    "FewShotClassifier",
    "FullContextMatchingHead",
    "L2GWrapper",
    "MatchingHead",
    "MetricModel",
    "PrototypicalHead",
    "RelationHead",
    "ResNet12",
    "Task",
    "TaskPairs",
    "check_head",
    "evaluate",
    "load",
    "load_run",
    "paired_difference",
    "relation_embedding",
    "train",
]

# Imported at first use: PyTorch takes seconds, which `l2g --help` need not.
_HOMES = {
    "models.backbones": ("Conv4", "ResNet12", "relation_embedding"),
    "training.build": ("load_run",),
    "classify.classifier": ("FewShotClassifier",),
    "training.config": ("Config",),
    "data": ("Episodes", "TaskPairs", "load"),
    "evaluation.episodes": ("evaluate", "paired_difference"),
    "models.heads": ("FullContextMatchingHead", "MatchingHead", "PrototypicalHead"),
    "models.relation_network": ("RelationHead",),
    "models.metric": ("MetricModel",),
    "models.batchnorm_policy": ("batchnorm_policy",),
    "task": ("Task",),
    "algorithm": ("L2GWrapper",),
    "testing": ("check_head",),
    "training.loop": ("train",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name, from the file that defines it."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
