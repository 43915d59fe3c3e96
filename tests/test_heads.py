import pytest
import torch
from torch import nn

from l2g_meta import FullContextMatchingHead, MatchingHead, PrototypicalHead, RelationHead
from l2g_meta import functional as f
from l2g_meta.errors import FitError
from l2g_meta.heads import HEADS
from l2g_meta.testing import LAWS, check_head


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_every_head_obeys_the_laws(head, either_backend):
    assert len(check_head(head)) == len(LAWS)


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

    def lstm(cell, x, h, c):  # gates in PyTorch's order: in, forget, cell, out
        z = cell.weight_ih @ x + cell.bias_ih + cell.weight_hh @ h + cell.bias_hh
        i, f, g, o = z[0:3].sigmoid(), z[3:6].sigmoid(), z[6:9].tanh(), z[9:12].sigmoid()
        c = f * c + i * g
        return o * c.tanh(), c

    def read(cell, rows):
        h = c = torch.zeros(3, dtype=torch.float64)
        states = []
        for x in rows:
            h, c = lstm(cell, x, h, c)
            states.append(h)
        return states

    ahead, back = read(head.ahead, support), read(head.back, list(support)[::-1])[::-1]
    g = [ahead[k] + back[k] + support[k] for k in range(4)]
    for k in range(4):
        torch.testing.assert_close(head.embed_support(support)[k], g[k])
    for q in range(2):
        h, c = query[q], torch.zeros(3, dtype=torch.float64)
        for _ in range(2):
            weights = torch.stack([h @ g_k for g_k in g]).softmax(0)
            r = sum(weights[k] * g[k] for k in range(4))
            h, c = lstm(head.attention, torch.cat([query[q], r]), h, c)
            h = h + query[q]
        torch.testing.assert_close(head.embed_query(query, head.embed_support(support))[q], h)


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


def test_relation_scores_pair_by_pair():
    head = RelationHead(3, 4).eval()
    support, query, y = torch.randn(4, 3, 4, 4), torch.randn(3, 3, 4, 4), torch.tensor([1, 0, 1, 0])
    scores = head(support, y, query, 2)
    for i in range(3):
        for c in range(2):
            pair = torch.cat([support[y == c].sum(0), query[i]])  # eq. 9: the class's maps are summed
            torch.testing.assert_close(scores[i, c], head.relation(pair[None])[0, 0])
    assert ((scores > 0) & (scores < 1)).all()


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


@pytest.mark.parametrize(
    ("head", "complaint"),
    [
        (_Stale, "relabelling_permutes_columns: .*after relabelling"),
        (_Detached, "task_loss_is_twice_differentiable: .*Jacobian"),
        (_Sorted, "relabelling_permutes_columns"),
        (_Cusp, "derivatives_exist_at_a_support: .*not finite where a query equals a support"),
        (_Transposed, r"need scores \(n_query, n_way\)"),
    ],
)
def test_the_laws_catch_broken_heads(head, complaint):
    with pytest.raises(AssertionError, match=complaint):
        check_head(head)
