import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2g_meta import FullContextMatchingHead, MatchingHead, PrototypicalHead, RelationHead
from l2g_meta.errors import FitError
from l2g_meta.models import functional as f
from l2g_meta.models.heads import HEADS
from l2g_meta.testing import LAWS, check_head


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_every_head_obeys_the_laws(head, either_backend):
    report = check_head(head)
    untrained = {"a_support_is_known_again"} if head is RelationHead else set()
    assert set(report.holds) == {law.__name__ for law in LAWS} - untrained
    assert [finding.split(" ")[0] for finding in report.findings] == list(untrained)


@pytest.mark.parametrize(
    "head",
    [
        PrototypicalHead(distance="squared"),
        PrototypicalHead(distance="squared", dims="mean", learn_temperature=True),
        PrototypicalHead(dims="mean", reduction="sum"),
        PrototypicalHead(distance="cosine", temperature=0.1),
        MatchingHead(temperature=0.1, learn_temperature=True, reduction="sum"),
        RelationHead(4, (4, 4), hidden=3, reduction="sum"),
    ],
    ids=lambda head: repr(head)[:60],
)
def test_options_obey_the_laws(head):
    check_head(head)


@pytest.mark.parametrize("head", [PrototypicalHead, MatchingHead])
def test_vectors_are_taken_too(head):
    check_head(head, feature_shape=(6,))


def test_prototypical_scores_are_minus_the_distance_to_the_mean():
    support, query, y = torch.randn(4, 3), torch.randn(2, 3), torch.tensor([0, 1, 0, 1])
    c = torch.stack([(support[0] + support[2]) / 2, (support[1] + support[3]) / 2])
    expected = -torch.cdist(query, c)
    torch.testing.assert_close(PrototypicalHead(eps=0.0)(support, y, query, 2), expected)
    torch.testing.assert_close(PrototypicalHead(eps=0.0, temperature=2.0)(support, y, query, 2), expected / 2)


def test_matching_scores_are_log_attention_mass_by_a_loop():
    support, query, y = torch.randn(5, 3), torch.randn(2, 3), torch.tensor([0, 1, 0, 1, 1])
    scores = MatchingHead(eps=0.0)(support, y, query, 2)
    for i in range(2):
        attention = torch.cosine_similarity(query[i : i + 1], support).softmax(0)
        for c in range(2):
            torch.testing.assert_close(scores[i, c].exp(), attention[y == c].sum())


def test_full_context_embeddings_step_by_step():
    head = FullContextMatchingHead(3, steps=2).double()
    support, query = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    g, f = step_by_step(head, support, query)
    torch.testing.assert_close(head.embed_support(support), g)
    torch.testing.assert_close(head.embed_query(query, head.embed_support(support)), f)


def step_by_step(head, support, query):
    """Full-context embeddings of supports and queries from the written recurrence, one vector after the other."""
    d, zeros = head.dim, torch.zeros_like(support[0])

    def lstm(cell, x, h, c):  # gates in PyTorch's order: in, forget, cell, out
        z = cell.weight_ih @ x + cell.bias_ih + cell.weight_hh @ h + cell.bias_hh
        i, f, g, o = z[:d].sigmoid(), z[d : 2 * d].sigmoid(), z[2 * d : 3 * d].tanh(), z[3 * d :].sigmoid()
        c = f * c + i * g
        return o * c.tanh(), c

    def read(cell, rows):
        h = c = zeros
        states = []
        for x in rows:
            h, c = lstm(cell, x, h, c)
            states.append(h)
        return states

    ahead, back = read(head.ahead, support), read(head.back, list(support)[::-1])[::-1]
    g = [ahead[k] + back[k] + support[k] for k in range(len(support))]
    read_queries = []
    for x in query:
        h, c = x, zeros
        for _ in range(head.steps):
            weights = torch.stack([h @ g_k for g_k in g]).softmax(0)
            r = sum(weights[k] * g[k] for k in range(len(g)))
            h, c = lstm(head.attention, torch.cat([x, r]), h, c)
            h = h + x
        read_queries.append(h)
    return torch.stack(g), torch.stack(read_queries)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
def test_second_derivatives_of_full_context_embeddings_are_the_recurrences(device):
    """Through PyTorch's LSTM cell, which on CUDA is one fused kernel, and through elementary operations."""
    head = FullContextMatchingHead(4, steps=3).double().to(device)
    support, query = (torch.randn(n, 4, dtype=torch.float64).to(device).requires_grad_() for n in (4, 3))
    inputs = [support, query, *(p for cell in (head.ahead, head.back, head.attention) for p in cell.parameters())]
    y, query_y = torch.arange(4, device=device) % 2, torch.tensor([0, 1, 1], device=device)
    direction = [torch.randn(v.shape, dtype=torch.float64).to(device) for v in inputs]

    def products(embed):  # loss, gradient, Hessian times a direction
        g, f = embed()
        loss = head.loss_fn(head.matching(g, y, f, 2), query_y)
        gradient = torch.autograd.grad(loss, inputs, create_graph=True)
        slope = sum((a * b).sum() for a, b in zip(gradient, direction, strict=True))
        return [loss, *gradient, *torch.autograd.grad(slope, inputs)]

    def embed():
        g = head.embed_support(support)
        return g, head.embed_query(query, g)

    ours, written = products(embed), products(lambda: step_by_step(head, support, query))
    assert all(curvature.abs().max() > 1e-6 for curvature in written[1 + len(inputs) :])
    for a, b in zip(ours, written, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_full_context_reads_queries_apart_and_supports_in_order():
    head = FullContextMatchingHead(3).double()
    support, query = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    y, order = torch.tensor([0, 1, 0, 1]), torch.tensor([2, 1, 0, 3])
    scores = head(support, y, query, 2)
    torch.testing.assert_close(head(support, y, query[3:4], 2), scores[3:4])
    assert (head(support[order], y[order], query, 2) - scores).abs().max() > 1e-6
    with pytest.raises(FitError, match="needs features of length 3, the encoder gives 4"):
        head(torch.randn(2, 4), torch.arange(2), torch.randn(1, 4), 2)
    with pytest.raises(FitError, match="need steps of at least 1, got 0"):
        FullContextMatchingHead(3, steps=0)


@pytest.mark.parametrize("training", [False, True])
def test_relation_scores_pair_by_pair(training):
    """Eq. 9 and 10 written out: loops over queries and classes, PyTorch's plain operators, the published layers."""
    head = RelationHead(3, 8).double().train(training)
    blocks, first, last = head.relation[:2], head.relation[3], head.relation[5]
    for block in blocks:
        nn.init.uniform_(block.norm.weight, 0.5, 1.5)
        nn.init.normal_(block.norm.bias, std=0.1)
        block.norm.running_mean.normal_(std=0.1)
        block.norm.running_var.uniform_(0.5, 2.0)
    for layer in (first, last):  # so that scores differ
        nn.init.normal_(layer.weight, std=0.5)
    support, query = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    y, pairs = torch.tensor([1, 0, 1, 0]), []
    for x in query:
        for c in range(2):
            summed = sum(support[k] for k in range(4) if y[k] == c)  # eq. 9: the class's maps are summed
            pairs.append(torch.cat([summed, x]))
    z = torch.stack(pairs)  # together: in training they share batch statistics
    for block in blocks:
        norm = block.norm
        z = F.conv2d(z, block.conv.weight, padding=1)
        mean, var = norm.running_mean, norm.running_var
        if training:
            mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
        mean, var, weight, bias = (v[:, None, None] for v in (mean, var, norm.weight, norm.bias))
        z = F.max_pool2d(((z - mean) / (var + norm.eps).sqrt() * weight + bias).clamp(min=0), 2)
    hidden = (z.flatten(1) @ first.weight.T + first.bias).clamp(min=0)
    written = 1 / (1 + (-(hidden @ last.weight.T + last.bias)).exp())
    scores = head(support, y, query, 2)
    torch.testing.assert_close(scores.flatten(), written.flatten(), rtol=1e-9, atol=1e-12)
    assert scores.std() > 0.01 and ((scores > 0) & (scores < 1)).all()


def test_reduction_is_a_factor():
    s, y = torch.randn(6, 3), torch.arange(6) % 3
    for head, factor in ((PrototypicalHead, 6), (MatchingHead, 6)):
        torch.testing.assert_close(head(reduction="sum").loss_fn(s, y), factor * head().loss_fn(s, y))
    torch.testing.assert_close(RelationHead(4, 4, reduction="sum").loss_fn(s, y), 18 * RelationHead(4, 4).loss_fn(s, y))


def test_bad_arguments_say_what_is_needed():
    with pytest.raises(FitError, match="distance to be one of euclidean, squared, cosine; got 'manhattan'"):
        PrototypicalHead(distance="manhattan")
    with pytest.raises(FitError, match="temperature above 0"):
        MatchingHead(temperature=0.0)
    with pytest.raises(FitError, match="reduction"):
        PrototypicalHead(reduction="none")
    with pytest.raises(FitError, match=r"at least 4×4 .* got 1×1; use the relation\s+embedding"):
        RelationHead(64, 1)
    with pytest.raises(FitError, match=r"needs feature maps \(8, 5, 5\), the encoder gives \(8, 4, 4\)"):
        RelationHead(8, 5)(torch.randn(2, 8, 4, 4), torch.arange(2), torch.randn(2, 8, 4, 4), 2)


class _Stale(nn.Module):
    """Remembers the first prototypes: the bug that the contract forbids."""

    def __init__(self):
        super().__init__()
        self.prototypes = None

    def forward(self, support, support_y, query, n_way):
        if self.prototypes is None or len(self.prototypes) != n_way:
            self.prototypes = f.prototypes(support.flatten(1), support_y, n_way)
        return -f.squared_euclidean(query.flatten(1), self.prototypes)


class _Detached(nn.Module):
    def forward(self, support, support_y, query, n_way):
        c = f.prototypes(support.flatten(1), support_y, n_way)
        return -f.squared_euclidean(query.flatten(1), c.detach())


class _Sorted(nn.Module):
    def forward(self, support, support_y, query, n_way):
        return (-f.euclidean(query.flatten(1), f.prototypes(support.flatten(1), support_y, n_way))).sort(-1)[0]


class _Cusp(nn.Module):
    def forward(self, support, support_y, query, n_way):
        return -f.euclidean(query.flatten(1), f.prototypes(support.flatten(1), support_y, n_way), eps=0.0)


class _Transposed(nn.Module):
    def forward(self, support, support_y, query, n_way):
        return -f.euclidean(f.prototypes(support.flatten(1), support_y, n_way), query.flatten(1))


class _Farthest(nn.Module):
    """The wrong sign: a distance is no score."""

    def forward(self, support, support_y, query, n_way):
        return f.euclidean(query.flatten(1), f.prototypes(support.flatten(1), support_y, n_way))


class _Constant(nn.Module):
    """Knows nothing, yet has gradients."""

    def forward(self, support, support_y, query, n_way):
        c = f.prototypes(support.flatten(1), support_y, n_way)
        return query.flatten(1).square().sum(1, keepdim=True) + c.square().sum() + torch.zeros(n_way)


class _SoftmaxTwice(nn.Module):
    """Probabilities for cross-entropy, which takes the softmax itself."""

    def forward(self, support, support_y, query, n_way):
        return PrototypicalHead()(support, support_y, query, n_way).softmax(-1)


class _SmoothedTwice(_SoftmaxTwice):
    """The same, scaled, under another loss that takes the softmax itself."""

    def forward(self, support, support_y, query, n_way):
        return 0.99 * super().forward(support, support_y, query, n_way)

    def loss_fn(self, scores, query_y):
        return nn.functional.cross_entropy(scores, query_y, label_smoothing=0.1)


class _SoftmaxTwiceSummed(_SoftmaxTwice):
    def loss_fn(self, scores, query_y):
        return F.cross_entropy(scores, query_y, reduction="sum")


class _ScaleFromZero(nn.Module):
    """Logits whose learned scale begins at 0: all rows are zeros at first, and no probabilities."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, support, support_y, query, n_way):
        return self.scale * PrototypicalHead(distance="squared")(support, support_y, query, n_way)


class _Probabilities(_SoftmaxTwice):
    """Probabilities with their own likelihood, as they should be."""

    def loss_fn(self, scores, query_y):
        return F.nll_loss(scores.log(), query_y)


class _ProjectedToZero(nn.Module):
    """A projection that begins with zeros and stays there: no gradient reaches it."""

    def __init__(self, dim):
        super().__init__()
        self.project = nn.Linear(dim, 3, bias=False)
        nn.init.zeros_(self.project.weight)

    def forward(self, support, support_y, query, n_way):
        support, query = self.project(support.flatten(1)), self.project(query.flatten(1))
        return PrototypicalHead()(support, support_y, query, n_way)


class _FixedToZero(_ProjectedToZero):
    def __init__(self, dim):
        super().__init__(dim)
        self.requires_grad_(False)


class _DotProduct(nn.Module):
    def forward(self, support, support_y, query, n_way):
        return query.flatten(1) @ f.prototypes(support.flatten(1), support_y, n_way).T


class _CentredOnQueries(nn.Module):
    """Transductive: all queries of the episode move the origin."""

    def forward(self, support, support_y, query, n_way):
        mean = query.flatten(1).mean(0)
        return PrototypicalHead(distance="cosine")(support.flatten(1) - mean, support_y, query.flatten(1) - mean, n_way)


class _LearnedFarthest(_Farthest):
    """The wrong sign, which a weight could turn round: it may learn to be right."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, support, support_y, query, n_way):
        return self.weight * super().forward(support, support_y, query, n_way)


def test_findings_do_not_fail():
    names = {law.__name__ for law in LAWS}
    for sound in (_DotProduct, _Probabilities):
        assert check_head(sound) == (tuple(law.__name__ for law in LAWS), ())
        assert check_head(sound, feature_shape=(6,)).findings == ()
    report = check_head(_CentredOnQueries)
    assert set(report.holds) == names - {"queries_are_scored_apart"}
    assert re.match(r"queries_are_scored_apart \(advisory\): transductive: .* change a query's", report.findings[0])
    report = check_head(_LearnedFarthest)
    assert set(report.holds) == names - {"a_support_is_known_again"} and len(report.findings) == 1
    assert report.findings[0].startswith("a_support_is_known_again (advisory): need the highest score")


def test_a_scale_that_begins_at_zero_gives_no_probabilities():
    assert "cross_entropy_gets_no_probabilities" in check_head(_ScaleFromZero).holds


@pytest.mark.parametrize(
    ("head", "complaint"),
    [
        (_Stale, "relabelling_permutes_columns: .*after relabelling"),
        (_Detached, "task_loss_is_twice_differentiable: .*Jacobian"),
        (_Sorted, "relabelling_permutes_columns"),
        (_Cusp, "derivatives_exist_at_a_support: .*not finite where a query equals a support"),
        (_Farthest, "a_support_is_known_again: need the highest score .*check the sign"),
        (_Constant, "the_loss_has_a_gradient: .* look for constant scores"),
        (_SoftmaxTwice, "cross_entropy_gets_no_probabilities: .*leave the softmax out"),
        (_SmoothedTwice, "cross_entropy_gets_no_probabilities: .*leave the softmax out"),
        (_SoftmaxTwiceSummed, "cross_entropy_gets_no_probabilities"),
        (_ProjectedToZero, "the_loss_has_a_gradient: need a gradient, got zero .*zero projections"),
        (_FixedToZero, "the_loss_has_a_gradient: need a gradient, got zero .*zero projections"),
        (_Transposed, r"need scores \(n_query, n_way\)"),
    ],
)
def test_the_laws_catch_broken_heads(head, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_head(head)
