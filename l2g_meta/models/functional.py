"""The mathematics of metric-based few-shot learning as pure functions.

Equation numbers are those of Lee et al., *Learning to Generalize to Unseen Tasks with Bilevel Optimization*
(arXiv 1908.01457). Everything here is twice differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Reduction = Literal["mean", "sum"]
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum")


def class_sums(
    z: Tensor,  # (n_support, ...)
    y: Tensor,  # (n_support,)
    n_way: int,
) -> Tensor:  # (n_way, ...)
    r"""Sum of the embeddings of each class, :math:`\sum_{y_i = c} z_i`.

    Shapes: z (n_support, ...), y (n_support,) -> (n_way, ...).

    Example:
        >>> class_sums(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 1, 0]), 2).flatten().tolist()
        [5.0, 2.0]
    """
    members = (y == torch.arange(n_way, device=y.device)[:, None]).to(z.dtype)  # (n_way, n_support)
    return (members @ z.flatten(1)).unflatten(1, z.shape[1:])


def prototypes(
    z: Tensor,  # (n_support, d)
    y: Tensor,  # (n_support,)
    n_way: int,
) -> Tensor:  # (n_way, d)
    r"""Class means (eq. 6): :math:`c_k = \frac{1}{|S_k|} \sum_{(x, y) \in S_k} f_\theta(x)`.

    Shapes: z (n_support, d), y (n_support,) -> (n_way, d).

    Example:
        >>> prototypes(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([0, 1, 0]), 2).flatten().tolist()
        [2.5, 2.0]
    """
    counts = class_sums(torch.ones_like(z[:, :1]), y, n_way)  # (n_way, 1)
    return class_sums(z, y, n_way) / counts


def squared_euclidean(
    a: Tensor,  # (n, d)
    b: Tensor,  # (m, d)
    *,
    dims: Reduction = "sum",
) -> Tensor:  # (n, m)
    r"""Squared distances :math:`\|a_i - b_j\|^2`, summed or averaged over the d dimensions.

    Taken from differences, which stay exact near zero where a² − 2ab + b² cancels.

    Shapes: a (n, d), b (m, d) -> (n, m).

    Example:
        >>> squared_euclidean(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])).item()
        25.0
    """
    squares = (a[:, None] - b).square()
    return squares.sum(-1) if dims == "sum" else squares.mean(-1)


def euclidean(
    a: Tensor,  # (n, d)
    b: Tensor,  # (m, d)
    *,
    dims: Reduction = "sum",
    eps: float = 1e-6,
) -> Tensor:  # (n, m)
    r"""Distances of eq. 7, smoothed: :math:`\sqrt{\|a_i - b_j\|^2 + \epsilon}`.

    Without ε neither derivative exists at a_i = b_j (a duplicate image, dead features).

    Shapes: a (n, d), b (m, d) -> (n, m).

    Example:
        >>> euclidean(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), eps=0.0).item()
        5.0
    """
    return (squared_euclidean(a, b, dims=dims) + eps).sqrt()


def cosine_similarity(
    a: Tensor,  # (n, d)
    b: Tensor,  # (m, d)
    *,
    eps: float = 1e-6,
) -> Tensor:  # (n, m)
    r"""Cosines :math:`a_i \cdot b_j / \sqrt{(\|a_i\|^2 + \epsilon)(\|b_j\|^2 + \epsilon)}`, smooth at zero.

    Shapes: a (n, d), b (m, d) -> (n, m).

    Example:
        >>> cosine_similarity(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]]), eps=0.0).tolist()
        [[1.0, 0.0]]
    """
    a = a / (a.square().sum(-1, keepdim=True) + eps).sqrt()
    b = b / (b.square().sum(-1, keepdim=True) + eps).sqrt()
    return a @ b.T


def nll_loss(
    scores: Tensor,  # (n_query, n_way)
    y: Tensor,  # (n_query,)
    *,
    reduction: Reduction = "mean",
) -> Tensor:  # ()
    r"""Negative log-likelihood of eq. 8, :math:`-\sum_i \log \mathrm{softmax}(s_i)_{y_i}`.

    The paper sums over the queries; ``reduction="mean"`` divides by their number, and the inner step with it.

    Shapes: scores (n_query, n_way), y (n_query,) -> ().

    Example:
        >>> round(nll_loss(torch.zeros(3, 2), torch.tensor([0, 1, 0]), reduction="sum").item() / 3, 4)
        0.6931
    """
    return F.cross_entropy(scores, y, reduction=reduction)


def relation_loss(
    scores: Tensor,  # (n_query, n_way)
    y: Tensor,  # (n_query,)
    *,
    reduction: Reduction = "mean",
) -> Tensor:  # ()
    r"""Squared error of eq. 11, :math:`\sum_{i,c} (r_{i,c} - 1[y_i = c])^2`.

    The paper sums over all n_query · n_way scores; ``reduction="mean"`` divides by that number.

    Shapes: scores (n_query, n_way), y (n_query,) -> ().

    Example:
        >>> relation_loss(torch.tensor([[1.0, 0.5]]), torch.tensor([0]), reduction="sum").item()
        0.25
    """
    target = (y[:, None] == torch.arange(scores.shape[1], device=y.device)).to(scores.dtype)
    return F.mse_loss(scores, target, reduction=reduction)


def accuracy(
    scores: Tensor,  # (n_query, n_way)
    y: Tensor,  # (n_query,)
) -> Tensor:  # ()
    """Share of queries whose highest score is that of their class, in [0, 1].

    Shapes: scores (n_query, n_way), y (n_query,) -> ().

    Example:
        >>> accuracy(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])).item()
        0.5
    """
    return (scores.argmax(-1) == y).double().mean()


# Student's t, 97.5% quantile, for 1 … 30 degrees of freedom (any statistics table).
_T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
         2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
         2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423)  # fmt: skip


def confidence_interval(values: Sequence[float] | Tensor) -> float:
    r"""Half width of the 95% confidence interval of a mean, :math:`t_{0.975, n-1}\, s / \sqrt n` (Student).

    Args:
        values: n independent observations, in any unit; the result has the same. NaN for n = 1.

    Example:
        >>> round(confidence_interval([1.0, 2.0, 3.0]), 3)
        2.484
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    n = x.numel()
    if n < 2:
        return math.nan
    # Beyond the table, the quantile's expansion in 1/df is exact to four decimals.
    z, df = 1.959964, n - 1
    t = _T975[df - 1] if df <= len(_T975) else z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    return t * x.std().item() / math.sqrt(n)
