"""Metric heads: how queries are scored against labelled supports. A new head edits this file only.

A head is an ``nn.Module`` with ``forward(support, support_y, query, n_way) -> scores`` and the loss it is trained with,
``loss_fn(scores, query_y)``. It stores nothing about an episode: prototypes kept on ``self`` would be stale after the
step θ → θ'. ``l2g_meta.testing.check_head`` runs the oracles and laws on any head.
The Relation Network's head, which has convolutions of its own, is in ``relation_network.py``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from l2g_meta.errors import FitError, one_of
from l2g_meta.models import functional as f
from l2g_meta.models.relation_network import RelationHead


class PrototypicalHead(nn.Module):
    r"""Prototypical Network (eq. 6–8; Snell et al. 2017): score = −distance to the class mean.

    The distance's scale decides, together with the step size α, how much one inner step changes the model
    (θ' − θ = −α ∇L), so it is explicit.

    Args:
        distance: ``"euclidean"`` is eq. 7 as written; ``"squared"`` is what most code uses; ``"cosine"`` scores by
            cosine similarity.
        dims: ``"sum"`` or ``"mean"`` over the embedding's dimensions, inside the root for ``"euclidean"``.
        temperature: scores are divided by it; e.g. 0.1 for cosine × 10, √d for squared / √d.
        learn_temperature: train the temperature (through its logarithm, in the inner step too).
        reduction: ``"mean"`` over queries, or ``"sum"`` as eq. 8 is written.
        eps: added to squared distances under the root, and to squared norms.

    Shapes:
        support (n_support, ...), support_y (n_support,), query (n_query, ...) -> scores (n_query, n_way); features are
        flattened to vectors.

    Example:
        >>> head = PrototypicalHead(distance="squared")
        >>> support, query = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0]])
        >>> head(support, torch.tensor([0, 1]), query, 2).tolist()
        [[-1.0, -1.0]]
    """

    def __init__(
        self,
        *,
        distance: Literal["euclidean", "squared", "cosine"] = "euclidean",
        dims: f.Reduction = "sum",
        temperature: float = 1.0,
        learn_temperature: bool = False,
        reduction: f.Reduction = "mean",
        eps: float = 1e-6,
    ):
        super().__init__()
        one_of("distance", distance, ("euclidean", "squared", "cosine"))
        one_of("dims", dims, f.REDUCTIONS)
        self.distance, self.dims, self.eps = distance, dims, eps
        self.reduction = one_of("reduction", reduction, f.REDUCTIONS)
        self.temperature = Temperature(temperature, learn=learn_temperature)

    def forward(
        self,
        support: Tensor,  # (n_support, ...)
        support_y: Tensor,  # (n_support,)
        query: Tensor,  # (n_query, ...)
        n_way: int,
    ) -> Tensor:  # (n_query, n_way)
        """Scores −d(f(x), c_k) / temperature of eq. 7."""
        support, query = support.flatten(1), query.flatten(1)
        c = f.prototypes(support, support_y, n_way)  # (n_way, d)
        if self.distance == "cosine":
            closeness = f.cosine_similarity(query, c, eps=self.eps)
        elif self.distance == "squared":
            closeness = -f.squared_euclidean(query, c, dims=self.dims)
        else:
            closeness = -f.euclidean(query, c, dims=self.dims, eps=self.eps)
        return self.temperature(closeness)

    def loss_fn(self, scores: Tensor, query_y: Tensor) -> Tensor:
        """Eq. 8."""
        return f.nll_loss(scores, query_y, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"distance={self.distance!r}, dims={self.dims!r}, reduction={self.reduction!r}, eps={self.eps}"


class MatchingHead(nn.Module):
    r"""Matching Network (Vinyals et al. 2016) without full-context embeddings: cosine attention over the supports.

    :math:`p(y = c \mid x) = \sum_{y_i = c} a(x, x_i)`, with a the softmax of cosine similarities / temperature; scores
    are log-probabilities.

    Args:
        temperature: cosines are divided by it; 1 as published.
        learn_temperature: train the temperature (through its logarithm).
        reduction: ``"mean"`` or ``"sum"`` of the negative log-likelihood over queries.
        eps: added to squared norms.

    Shapes:
        support (n_support, ...), support_y (n_support,), query (n_query, ...) -> scores (n_query, n_way).

    Example:
        >>> support, query = torch.eye(2), torch.tensor([[1.0, 0.0]])
        >>> MatchingHead()(support, torch.tensor([0, 1]), query, 2).exp().sum().item()
        1.0
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        reduction: f.Reduction = "mean",
        eps: float = 1e-6,
    ):
        super().__init__()
        self.eps = eps
        self.reduction = one_of("reduction", reduction, f.REDUCTIONS)
        self.temperature = Temperature(temperature, learn=learn_temperature)

    def forward(
        self,
        support: Tensor,  # (n_support, ...)
        support_y: Tensor,  # (n_support,)
        query: Tensor,  # (n_query, ...)
        n_way: int,
    ) -> Tensor:  # (n_query, n_way)
        """Log-probabilities of the classes."""
        cosine = f.cosine_similarity(query.flatten(1), support.flatten(1), eps=self.eps)  # (n_query, n_support)
        log_attention = self.temperature(cosine).log_softmax(-1).T  # (n_support, n_query)
        # logsumexp by class, in as much memory as the attention: (n_query, n_way, n_support) took 4 GB for 1000 ways
        index, values = support_y[:, None].expand_as(log_attention), log_attention.detach()
        largest = values.new_full((n_way, values.shape[1]), -torch.inf).scatter_reduce(0, index, values, "amax")
        sums = torch.zeros_like(largest).index_add(0, support_y, (log_attention - largest[support_y]).exp())
        return (sums.log() + largest).T

    def loss_fn(self, scores: Tensor, query_y: Tensor) -> Tensor:
        """Negative log-likelihood; log-probabilities are unchanged by the softmax of eq. 8."""
        return f.nll_loss(scores, query_y, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"reduction={self.reduction!r}, eps={self.eps}"


class FullContextMatchingHead(nn.Module):
    r"""Matching Network with full-context embeddings (Vinyals et al. 2016): the supports change how all are embedded.

    With z' the encoder's features, a bidirectional LSTM reads the supports in the order given (appendix A.2), and an
    LSTM with attention over them reads each query K times (appendix A.1, eq. 2–5):

    .. math::
        g(x_i, S) &= \overrightarrow{h}_i + \overleftarrow{h}_i + g'(x_i) \\
        r_{k-1} &= \sum_i \mathrm{softmax}_i(h_{k-1} \cdot g(x_i, S))\, g(x_i, S) \\
        \hat h_k, c_k &= \mathrm{LSTM}(f'(x), [h_{k-1}, r_{k-1}], c_{k-1}) \\
        h_k &= \hat h_k + f'(x), \qquad f(x, S) = h_K

    Then the cosine attention of ``MatchingHead``. The paper does not say how the reading starts: as in common code
    (Hariharan & Girshick 2017; Chen et al. 2019) h_0 = f'(x), that is ĥ_0 = 0, and c_0 = 0. Scores depend on the order
    of the supports, and no query on another.

    Args:
        dim: length d of the flattened features. The three LSTMs hold 28 d² weights, 72 million for Conv4 at 84 pixels.
        steps: readings K of each query, at least 1.
        temperature: as of ``MatchingHead``; so are the following.
        learn_temperature: train the temperature (through its logarithm).
        reduction: ``"mean"`` or ``"sum"`` of the negative log-likelihood over queries.
        eps: added to squared norms.

    Shapes:
        support (n_support, ...), support_y (n_support,), query (n_query, ...) -> scores (n_query, n_way).

    Raises:
        FitError: if ``steps`` is below 1, or features have another length than ``dim``.

    Example:
        >>> head = FullContextMatchingHead(2)
        >>> scores = head(torch.eye(2), torch.tensor([0, 1]), torch.randn(3, 2), 2)
        >>> torch.allclose(scores.exp().sum(-1), torch.ones(3))
        True
    """

    # Cells, not nn.LSTM: cuDNN's LSTM has no double backward (pytorch#5261). The cell's fused CUDA kernel has: where a
    # graph is asked for, its backward is the differentiable one (_thnn_differentiable_lstm_cell_backward).

    def __init__(
        self,
        dim: int,
        *,
        steps: int = 5,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        reduction: f.Reduction = "mean",
        eps: float = 1e-6,
    ):
        super().__init__()
        if steps < 1:
            raise FitError(f"need steps of at least 1, got {steps}; MatchingHead is the head without them")
        self.dim, self.steps = dim, steps
        self.ahead, self.back = nn.LSTMCell(dim, dim), nn.LSTMCell(dim, dim)
        self.attention = nn.LSTMCell(2 * dim, dim)  # r beside f' instead of beside h: the gates are the same sums
        self.matching = MatchingHead(
            temperature=temperature, learn_temperature=learn_temperature, reduction=reduction, eps=eps
        )

    def forward(
        self,
        support: Tensor,  # (n_support, ...)
        support_y: Tensor,  # (n_support,)
        query: Tensor,  # (n_query, ...)
        n_way: int,
    ) -> Tensor:  # (n_query, n_way)
        """Log-probabilities of the classes."""
        support, query = support.flatten(1), query.flatten(1)
        if support.shape[1] != self.dim:
            raise FitError(
                f"FullContextMatchingHead needs features of length {self.dim}, the encoder gives {support.shape[1]}; "
                "build it with FullContextMatchingHead(dim) of that length"
            )
        g = self.embed_support(support)
        return self.matching(g, support_y, self.embed_query(query, g), n_way)

    def embed_support(self, z: Tensor) -> Tensor:  # (n_support, d) -> (n_support, d)
        """Embeddings g(x_i, S) from features g'(x_i)."""
        return _outputs(self.ahead, z) + _outputs(self.back, z.flip(0)).flip(0) + z

    def embed_query(self, z: Tensor, g: Tensor) -> Tensor:  # (n_query, d), (n_support, d) -> (n_query, d)
        """Embeddings f(x, S) from features f'(x) and the supports' embeddings."""
        h, c = z, torch.zeros_like(z)
        for _ in range(self.steps):
            r = (h @ g.T).softmax(-1) @ g  # (n_query, d)
            h, c = self.attention(torch.cat([z, r], 1), (h, c))
            h = h + z
        return h

    def loss_fn(self, scores: Tensor, query_y: Tensor) -> Tensor:
        """Negative log-likelihood, as of ``MatchingHead``."""
        return self.matching.loss_fn(scores, query_y)

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return f"dim={self.dim}, steps={self.steps}"


class Temperature(nn.Module):
    """Division of scores by a temperature, fixed or learned through its logarithm.

    Args:
        value: the temperature, above 0.
        learn: make it a parameter, ``log_value``.

    Example:
        >>> Temperature(0.5, learn=False)(torch.tensor([1.0])).item()
        2.0
    """

    def __init__(self, value: float, *, learn: bool):
        super().__init__()
        if value <= 0:
            raise FitError(f"need a temperature above 0, got {value}")
        self.value = value
        self.log_value = nn.Parameter(torch.tensor(value).log()) if learn else None

    def forward(self, scores: Tensor) -> Tensor:
        """Scores of any shape, divided by the temperature."""
        return scores / (self.value if self.log_value is None else self.log_value.exp())

    def extra_repr(self) -> str:
        """Value, for printing."""
        return f"{self.value}, learn={self.log_value is not None}"


def _outputs(cell: nn.LSTMCell, z: Tensor) -> Tensor:  # (n, d) -> (n, d)
    """What the LSTM puts out as it reads z row by row, from a zero state."""
    h = c = torch.zeros_like(z[:1])
    outputs = []
    for row in z.split(1):
        h, c = cell(row, (h, c))
        outputs.append(h)
    return torch.cat(outputs)


HEADS = {
    "prototypical": PrototypicalHead,
    "relation": RelationHead,
    "matching": MatchingHead,
    "matching-fce": FullContextMatchingHead,
}
