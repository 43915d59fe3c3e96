"""``FewShotClassifier``: a trained model and a few labelled images as a scikit-learn estimator."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.utils import validation as v
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

from l2g_meta.classify import calibration as c
from l2g_meta.classify import photos as images
from l2g_meta.classify import scoring
from l2g_meta.classify.photos import Preparation
from l2g_meta.classify.source import Source, open_source
from l2g_meta.errors import DataError, L2GError
from l2g_meta.evaluation.episodes import at_once


class Predictions(NamedTuple):
    """What is said of n images.

    Args:
        labels: the most probable class, (n,).
        probabilities: of each of ``classes_``, (n, n_classes).
        nearest: position of the nearest support among all examples in the order given, (n,); −1 where not known.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    nearest: np.ndarray


class FewShotClassifier(ClassifierMixin, TransformerMixin, BaseEstimator):
    """Classifies images of new classes from a few examples of each, without training.

    ``fit`` embeds the examples once and keeps the embeddings; ``partial_fit`` adds examples and classes. Images may be
    paths, PIL images, arrays or tensors, see ``l2g_meta.classify.photos.inputs``. BatchNorm takes its running
    statistics, so that what is said of an image depends on no other image of the call. ``transform`` gives the
    embeddings, to any classifier behind it in a pipeline; those of the same image by the same folder or name are kept,
    as long as there is room (``l2g_meta.classify.scoring.CACHE``), so that folds and sweeps encode a photo once.

    The number of examples may differ from class to class; no class is favoured for having more
    (``l2g_meta.classify.scoring``). A model that is no plain ``MetricModel`` (one that adapts on the examples, or a
    module of one's own) is called with whole tasks, each with all examples and one batch of images: slower, since the
    examples are embedded again for each batch.

    Args:
        model: by default the model that comes with the package; a folder made by ``l2g train`` (its best checkpoint)
            or by ``l2g export``; ``timm:NAME``, ``torchvision:NAME`` or ``package.module:Class``; what ``open_source``
            made of one; or ``model(task) -> scores``, or its ``L2GWrapper``, of which a copy is used.
        weights: of an encoder by its name, a file with its state dict; the library's pretrained ones by default.
        temperature: scores are divided by it before the softmax; ``None`` takes that of the exported folder for the
            number of examples per class, and 1 where none is known: then probabilities are not calibrated.
        preparation: how images become inputs, for a module of which nothing is known; a folder brings its own.
        batch_size: images in one forward pass, at most: as many as have 4 million pixels, or one. So memory is bounded,
            whatever the number of images and their size.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, …
        trust: import the module that a folder may name as its head or backbone, which runs it.

    Attributes:
        classes_: labels, sorted.
        temperature_: the temperature in use.
        calibrated_: whether it was fitted on held-out episodes, or given.
        calibrated_shots_: examples per class of these episodes, of those there are the nearest; ``None`` without.
        n_examples_: number of examples, all calls together.
        n_features_in_: of arrays (n, features) alone.

    Raises:
        L2GError: on ``fit``, for a model that cannot be used, or images that cannot be read.

    Example:
        >>> from l2g_meta import FewShotClassifier, MetricModel, PrototypicalHead
        >>> classifier = FewShotClassifier(MetricModel(torch.nn.Flatten(), PrototypicalHead()), device="cpu")
        >>> classifier.fit([[0.0, 0.0], [0.0, 1.0], [4.0, 4.0]], ["near", "near", "far"]).predict([[3.0, 3.0]]).tolist()
        ['far']
        >>> classifier.partial_fit([[9.0, 9.0]], ["farther"]).classes_.tolist()
        ['far', 'farther', 'near']
        >>> classifier.transform([[3.0, 3.0]]).tolist()
        [[3.0, 3.0]]
    """

    def __init__(
        self,
        model: Any = None,
        *,
        weights: Path | str | None = None,
        temperature: float | None = None,
        preparation: Preparation | None = None,
        batch_size: int = 64,
        device: str = "auto",
        trust: bool = False,
    ):
        self.model = model
        self.weights = weights
        self.temperature = temperature
        self.preparation = preparation
        self.batch_size = batch_size
        self.device = device
        self.trust = trust

    @classmethod
    def load(cls, folder: Path | str, **options: Any) -> FewShotClassifier:
        """A classifier, of the class's ``options``, around a folder or a name that is read now: errors come here."""
        classifier = cls(str(folder), **options)
        classifier._open()
        return classifier

    def fit(self, X: Any, y: Any) -> FewShotClassifier:  # noqa: N803
        """Learns classes from examples, n images and their labels (n,), numbers or texts; forgets earlier ones."""
        self.__dict__.pop("supports_", None)
        return self.partial_fit(X, y)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> FewShotClassifier:  # noqa: N803
        """Adds examples, also of classes not seen before; the examples before are not embedded again.

        Args:
            X: images, n of them.
            y: their labels, (n,).
            classes: labels that may come, for the first call; those without an example have probability 0.
        """
        first = not hasattr(self, "supports_")
        X, y = self._validated(X, y, reset=first)
        known = np.unique(np.asarray(classes)) if classes is not None else np.asarray(y)[:0]
        if classes is not None and not np.isin(y, known).all():
            raise L2GError(f"need labels among the classes given, got {sorted(set(np.unique(y)) - set(known))} besides")
        if first:
            self.source_ = self._open()
            self.classes_, before, kept = y[:0], y[:0], []
        elif self.classes_.dtype.kind != y.dtype.kind and {self.classes_.dtype.kind, y.dtype.kind} & set("US"):
            raise L2GError(f"need labels like {self.classes_[:3].tolist()}, got {y[:3].tolist()}; convert them")
        else:
            before, kept = self.classes_[self._index], [self.supports_.z]
        self.classes_ = np.union1d(np.union1d(self.classes_, known), y)
        index = np.searchsorted(self.classes_, np.concatenate([before, y]))
        return self._keep(torch.cat([*kept, *self._embedded(X)]), index)

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """The label of each image, (n,)."""
        return self.classify(X, nearest=False).labels

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
        """Probability of each of ``classes_``, given that the image is of one of them, (n, n_classes)."""
        return self.classify(X, nearest=False).probabilities

    def transform(self, X: Any) -> np.ndarray:  # noqa: N803
        """Embeddings of images, (n, d), with running statistics; the examples make no difference to them.

        Raises:
            L2GError: for a model that has none which hold for all tasks.
        """
        v.check_is_fitted(self)
        if not scoring.scores_from_embeddings(self.source_.model):
            raise L2GError("need a MetricModel, whose encoder gives embeddings, got a model that adapts; use predict")
        X = self._checked(X, reset=False)
        return torch.cat([z.flatten(1).cpu() for z in self._embedded(X)]).numpy()

    def classify(self, X: Any, *, nearest: bool = True) -> Predictions:  # noqa: N803
        """All that is said of images, at once.

        Args:
            X: images, n of them.
            nearest: also look for the nearest example.
        """
        v.check_is_fitted(self)
        X = self._checked(X, reset=False)
        parts = [self._say(z, nearest) for z in self._embedded(X)]
        return Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _say(self, z: Tensor, nearest: bool) -> Predictions:
        """Of one batch, embedded."""
        scores = self.supports_.scores(z).cpu()  # double precision is not to be had on every device
        if not scores.isfinite().any(-1).all() or scores.isnan().any():
            raise L2GError("need scores that are numbers, got NaN: the model's weights are not finite; train again")
        p = np.zeros((len(z), len(self.classes_)))
        p[:, self.seen_] = c.probabilities(scores, self.temperature_).numpy()
        classes = self.classes_[self.seen_[scores.argmax(-1).numpy()]]
        found = self.supports_.nearest(z) if nearest else None
        at = np.full(len(z), -1) if found is None else found.cpu().numpy()
        return Predictions(classes, p, at)

    def _open(self) -> Source:
        if self.temperature is not None and not 0 < self.temperature < np.inf:
            raise L2GError(f"need a temperature above 0 and finite, got {self.temperature!r}")
        if not isinstance(self.batch_size, int | np.integer) or self.batch_size < 1:
            raise L2GError(f"need a batch_size of at least 1, got {self.batch_size!r}")
        source = open_source(self.model, self.device, trust=self.trust, weights=self.weights)
        scoring.check_inductive(source.model)
        return source

    def _keep(self, z: Tensor, index: np.ndarray) -> FewShotClassifier:
        """Takes all examples, old and new, as features (n, ...) and places in ``classes_`` (n,)."""
        self._index = index
        self.seen_, y = np.unique(index, return_inverse=True)
        labels = torch.as_tensor(y, device=z.device)
        self.supports_ = scoring.Supports(self.source_.model, z, labels, len(self.seen_))
        self.n_examples_ = len(z)
        shots, known = statistics.geometric_mean(np.bincount(y).tolist()), self.source_.calibration
        fitted = None if known is None else known.at(shots)
        self.calibrated_ = self.temperature is not None or fitted is not None
        self.calibrated_shots_ = None if self.temperature is not None or fitted is None else fitted.shots
        self.temperature_ = self.temperature or (1.0 if fitted is None else fitted.temperature)
        return self

    def _embedded(self, X: Any) -> Iterator[Tensor]:  # noqa: N803
        """What the supports are kept as, of one batch of images after the other: memory does not grow with them."""
        model, preparation = self.source_.model, self.source_.preparation or self.preparation
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        size = self.batch_size if preparation is None else at_once(self.batch_size, preparation.image_shape)
        for start in range(0, len(X), size):
            part = X[start : start + size]
            x = images.inputs(part, preparation, device=like.device, dtype=like.dtype)
            if not x.isfinite().all():
                raise DataError("need images of finite numbers, got NaN or infinity; clean them, or pass uint8 pixels")
            with torch.no_grad():
                yield scoring.embed(model, x, self.source_.token)

    def _validated(self, X: Any, y: Any, *, reset: bool) -> tuple[Any, np.ndarray]:  # noqa: N803
        if y is None:
            raise L2GError("need a label of each image: it requires y to be passed, but the target y is None")
        X = self._checked(X, reset=reset)
        y = v.column_or_1d(y.cpu() if isinstance(y, Tensor) else y, warn=True)
        v.assert_all_finite(y, input_name="y")
        check_classification_targets(y)
        v.check_consistent_length(X, y)
        return X, y

    def _checked(self, X: Any, *, reset: bool) -> Any:  # noqa: N803
        """Images as they came; what is a table of numbers, as scikit-learn has it checked."""
        images.check_several(X)
        if images.is_image_list(X) or (isinstance(X, np.ndarray | Tensor) and X.ndim > 2 and len(X)):
            if reset and hasattr(self, "n_features_in_"):
                del self.n_features_in_
            return X
        X = X.cpu().numpy() if isinstance(X, Tensor) else X
        return v.validate_data(self, X, reset=reset, allow_nd=True)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True  # paths
        tags.transformer_tags.preserves_dtype = []
        return tags
