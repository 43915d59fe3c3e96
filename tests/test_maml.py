import pytest
import torch
from torch import nn
from torch.nn import functional as F

from l2g_meta import L2GWrapper, Task, batchnorm_policy
from l2g_meta.errors import FitError
from l2g_meta.models.maml import SoftmaxMAML
from l2g_meta.training.objectives import episodic, meta_gradient


def small_task(n_way=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(4 * n_way, 1, 4, 4, generator=g, dtype=dtype), torch.arange(4 * n_way) % n_way
    return Task(x[:n_way], y[:n_way], x[n_way:], y[n_way:], n_way)


def small_classifier(n_way=3, norm=False):
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, n_way)).double()


def by_hand(classifier, task, lr, steps):
    """Finn et al., algorithm 2, by torch.func: scores of the queries as a function of the parameters."""

    def scores(parameters):
        def loss(p):
            return F.cross_entropy(torch.func.functional_call(classifier, p, (task.support_x,)), task.support_y)

        for _ in range(steps):
            g = torch.func.grad(loss)(parameters)
            parameters = {name: p - lr * g[name] for name, p in parameters.items()}
        return torch.func.functional_call(classifier, parameters, (task.query_x,))

    return scores


@pytest.mark.parametrize("steps", [1, 5])
def test_scores_and_meta_gradient_are_those_of_algorithm_2(steps, either_backend):
    task, classifier = small_task(), small_classifier()
    model = SoftmaxMAML(classifier, 3, inner_lr=0.3, inner_steps=steps)
    parameters = {name: p.detach() for name, p in classifier.named_parameters()}
    scores = by_hand(classifier, task, 0.3, steps)
    torch.testing.assert_close(model(task), scores(parameters), rtol=0, atol=1e-12)
    expected = torch.func.grad(lambda p: F.cross_entropy(scores(p), task.query_y))(parameters)
    meta_gradient(episodic, L2GWrapper(model, 0.0), [(task,)])
    for name, p in classifier.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=1e-12)


def test_meta_gradient_matches_finite_differences(either_backend):
    task, classifier = small_task(), small_classifier()
    model = SoftmaxMAML(classifier, 3, inner_lr=0.3, inner_steps=3)
    meta_gradient(episodic, L2GWrapper(model, 0.0), [(task,)])
    direction = {name: torch.randn_like(p) for name, p in classifier.named_parameters()}
    losses = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for name, p in classifier.named_parameters():
                p += step * direction[name]
            losses.append(F.cross_entropy(model(task), task.query_y))
            for name, p in classifier.named_parameters():
                p -= step * direction[name]
    slope = sum((p.grad * direction[name]).sum() for name, p in classifier.named_parameters())
    torch.testing.assert_close(slope, (losses[0] - losses[1]) / 2e-5, rtol=1e-7, atol=1e-9)


def test_either_path_is_learn2learns_maml_to_the_bit(either_backend):
    """With learn2learn's clone and with the built-in one, against learn2learn's own algorithm."""
    l2l = pytest.importorskip("learn2learn", reason="learn2learn is not installed")
    task, classifier = small_task(dtype=torch.float32), small_classifier().float()
    learner = l2l.algorithms.MAML(classifier, lr=0.3).clone()
    for _ in range(5):
        learner.adapt(F.cross_entropy(learner(task.support_x), task.support_y))
    F.cross_entropy(learner(task.query_x), task.query_y).backward()
    theirs = [p.grad.clone() for p in classifier.parameters()]
    classifier.zero_grad()
    meta_gradient(episodic, L2GWrapper(SoftmaxMAML(classifier, 3, inner_lr=0.3), 0.0), [(task,)])
    assert all(torch.equal(a, p.grad) for a, p in zip(theirs, classifier.parameters(), strict=True))


def test_without_steps_it_is_the_classifier_and_first_order_differs():
    task, classifier = small_task(), small_classifier()
    none = SoftmaxMAML(classifier, 3, inner_steps=0, test_steps=0)
    assert torch.equal(none(task), classifier(task.query_x)) and torch.equal(none.eval()(task), none(task))
    gradients = []
    for first_order in (False, True):
        classifier.zero_grad()
        model = SoftmaxMAML(classifier, 3, inner_lr=0.3, inner_steps=2, first_order=first_order)
        meta_gradient(episodic, L2GWrapper(model, 0.0), [(task,)])
        gradients.append(classifier[0].weight.grad.clone())
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4


def test_relabelling_the_outputs_permutes_the_columns():
    task, classifier = small_task(), small_classifier()
    model, order = SoftmaxMAML(classifier, 3, inner_lr=0.3), torch.tensor([2, 0, 1])
    scores = model(task)
    with torch.no_grad():
        classifier[-1].weight.copy_(classifier[-1].weight[order.argsort()])
        classifier[-1].bias.copy_(classifier[-1].bias[order.argsort()])
    renamed = task._replace(support_y=order[task.support_y], query_y=order[task.query_y])
    torch.testing.assert_close(model(renamed), scores[:, order.argsort()], rtol=0, atol=1e-12)


def test_evaluation_takes_its_own_number_of_steps_without_a_graph(either_backend):
    task, classifier = small_task(), small_classifier()
    model = SoftmaxMAML(classifier, 3, inner_lr=0.3, inner_steps=5, test_steps=10).eval()
    with torch.no_grad():
        scores = model(task)
    assert not scores.requires_grad
    expected = by_hand(classifier, task, 0.3, 10)({n: p.detach() for n, p in classifier.named_parameters()})
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)


def test_running_statistics_are_those_of_the_supports_under_theta_written_once(either_backend):
    task, classifier = small_task(), small_classifier(norm=True)
    twin = small_classifier(norm=True)
    twin.load_state_dict(classifier.state_dict())
    twin(task.support_x)
    model = SoftmaxMAML(classifier, 3, inner_lr=0.3)
    buffer = classifier[1].running_mean
    model(task)
    assert classifier[1].running_mean is buffer and classifier[1].num_batches_tracked.item() == 1
    torch.testing.assert_close([*classifier.buffers()], [*twin.buffers()])
    before = [b.clone() for b in classifier.buffers()]
    for policy in ("running", "batch"):
        with torch.no_grad(), batchnorm_policy(model, policy):
            first, second = model(task), model(task)
        assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(before, classifier.buffers(), strict=True))


def test_other_ways_and_frozen_classifiers_are_refused_frozen_parts_stay():
    model = SoftmaxMAML(small_classifier(), 3)
    with pytest.raises(FitError, match=r"need tasks of at most 3 ways, one per output of the classifier, got 4; train"):
        model(small_task(4))
    with pytest.raises(FitError, match="Identity has none"):
        SoftmaxMAML(nn.Identity(), 3)
    classifier = small_classifier()
    classifier[0].requires_grad_(False)
    meta_gradient(episodic, L2GWrapper(SoftmaxMAML(classifier, 3, inner_lr=0.3), 0.0), [(small_task(),)])
    assert classifier[0].weight.grad is None and classifier[-1].weight.grad is not None
