import math

import pytest
import torch

from l2g_meta.models import functional as f


def test_prototypes_are_class_means_by_a_plain_loop():
    z, y = torch.randn(7, 4), torch.tensor([2, 0, 1, 1, 0, 2, 2])
    expected = torch.stack([z[y == c].mean(0) for c in range(3)])
    torch.testing.assert_close(f.prototypes(z, y, 3), expected)


def test_class_sums_keep_maps():
    z, y = torch.randn(3, 2, 4, 4), torch.tensor([1, 0, 1])
    torch.testing.assert_close(f.class_sums(z, y, 2), torch.stack([z[1], z[0] + z[2]]))


def test_class_sums_of_very_many_classes():
    z, y = torch.randn(10_000, 3), torch.arange(10_000) % 5000
    torch.testing.assert_close(f.class_sums(z, y, 5000), z[:5000] + z[5000:])


def test_distances_against_loops():
    a, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    loop = torch.stack([torch.stack([((x - y) ** 2).sum() for y in b]) for x in a])
    torch.testing.assert_close(f.squared_euclidean(a, b), loop)
    torch.testing.assert_close(f.squared_euclidean(a, b, dims="mean"), loop / 5)
    torch.testing.assert_close(f.euclidean(a, b, eps=0.0), loop.sqrt())
    torch.testing.assert_close(f.euclidean(a, b, eps=0.0), torch.cdist(a, b))
    cosine = torch.stack([torch.cosine_similarity(x[None], b) for x in a])
    torch.testing.assert_close(f.cosine_similarity(a, b, eps=0.0), cosine)


@pytest.mark.parametrize("distance", [f.squared_euclidean, f.euclidean, f.cosine_similarity])
def test_distances_are_twice_differentiable_also_at_zero(distance):
    a = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(distance, (a, b))
    assert torch.autograd.gradgradcheck(distance, (a, b))
    same = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(distance(same, same.detach()).sum(), same, create_graph=True)
    (gg,) = torch.autograd.grad(g.square().sum(), same)
    assert torch.isfinite(g).all() and torch.isfinite(gg).all()


def test_losses_by_their_equations():
    s, y = torch.rand(3, 4, dtype=torch.float64), torch.tensor([1, 3, 0])
    nll = -sum(s[i].log_softmax(-1)[y[i]] for i in range(3))
    mse = sum((s[i, c] - (1.0 if y[i] == c else 0.0)) ** 2 for i in range(3) for c in range(4))
    torch.testing.assert_close(f.nll_loss(s, y, reduction="sum"), nll)
    torch.testing.assert_close(f.nll_loss(s, y), nll / 3)
    torch.testing.assert_close(f.relation_loss(s, y, reduction="sum"), mse)
    torch.testing.assert_close(f.relation_loss(s, y), mse / 12)


@pytest.mark.parametrize("n", [2, 3, 5, 10, 30, 31, 40, 100, 600, 3000])
def test_confidence_interval_is_students(n):
    stats = pytest.importorskip("scipy.stats")
    x = torch.randn(n, dtype=torch.float64)
    expected = stats.t.ppf(0.975, n - 1) * x.std().item() / math.sqrt(n)
    assert f.confidence_interval(x) == pytest.approx(expected, rel=5e-5)


def test_confidence_interval_of_one_value_is_unknown():
    assert math.isnan(f.confidence_interval([3.0]))
