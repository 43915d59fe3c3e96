"""Few-shot classifiers that generalise to unseen classes: bilevel metric learning (L2G) for PyTorch and learn2learn."""

from typing import TYPE_CHECKING, Any

from l2g_meta.backbones import Conv4 as Conv4
from l2g_meta.backbones import ResNet12 as ResNet12
from l2g_meta.backbones import relation_embedding as relation_embedding
from l2g_meta.conv import convert_conv as convert_conv
from l2g_meta.heads import FullContextMatchingHead as FullContextMatchingHead
from l2g_meta.heads import MatchingHead as MatchingHead
from l2g_meta.heads import PrototypicalHead as PrototypicalHead
from l2g_meta.heads import RelationHead as RelationHead
from l2g_meta.model import MetricModel as MetricModel
from l2g_meta.norm import batchnorm_policy as batchnorm_policy
from l2g_meta.norm import convert_batchnorm as convert_batchnorm
from l2g_meta.task import Task as Task
from l2g_meta.wrapper import L2GWrapper as L2GWrapper

if TYPE_CHECKING:
    from l2g_meta.classify.classifier import FewShotClassifier as FewShotClassifier

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``FewShotClassifier`` at first use: it takes scikit-learn, which is an extra."""
    if name == "FewShotClassifier":
        from l2g_meta.classify.classifier import FewShotClassifier

        return FewShotClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
