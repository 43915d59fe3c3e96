import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from l2g_meta import Conv4, L2GWrapper, MatchingHead, MetricModel, PrototypicalHead, RelationHead
from l2g_meta.data import ClassDataset
from l2g_meta.errors import FitError, L2GError
from l2g_meta.evaluation import episodes as evaluation_module
from l2g_meta.evaluation.episodes import evaluate, over_models, paired_difference
from l2g_meta.models.functional import confidence_interval


@pytest.fixture
def data():
    torch.manual_seed(1)
    centres = torch.randn(6, 1, 1, 16, 16, dtype=torch.float64)
    images = (centres + 4 * torch.randn(6, 8, 1, 16, 16, dtype=torch.float64)).flatten(0, 1)
    return ClassDataset(images, np.arange(48) // 8, name="noise", split="test")


def models():
    return [
        MetricModel(Conv4(1, 4), PrototypicalHead()),
        MetricModel(Conv4(1, 4), MatchingHead()),
        MetricModel(Conv4(1, 4, pools=2), RelationHead(4, 4)),
    ]


class Opaque(nn.Module):
    """A user's model: only forward(task)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, task):
        return self.model(task)


@pytest.mark.parametrize("model", models(), ids=["prototypical", "matching", "relation"])
def test_embedding_once_equals_embedding_per_episode(model, data, monkeypatch):
    model = model.double()
    model(next(iter(_tasks(data))))
    once = evaluate(model, data, ways=3, shots=2, queries=3, episodes=20, runs=2)
    each = evaluate(Opaque(model), data, ways=3, shots=2, queries=3, episodes=20, runs=2)
    assert once.accuracies == each.accuracies
    monkeypatch.setattr(evaluation_module, "EMBED_BYTES", 100)  # too large to keep: embedded per episode
    assert evaluate(model, data, ways=3, shots=2, queries=3, episodes=20, runs=2).accuracies == once.accuracies


def _tasks(data):
    from l2g_meta.data import Episodes

    yield Episodes(data, ways=3, shots=1, queries=3)[0]


def test_each_image_is_embedded_once(data):
    seen = []

    class Counting(nn.Module):
        def forward(self, x):
            seen.extend(x.flatten(1).sum(1).tolist())
            return x

    evaluate(MetricModel(Counting(), PrototypicalHead()), data, ways=3, queries=3, episodes=50, runs=2)
    assert len(seen) == len(set(seen)) <= len(data)


@pytest.mark.parametrize("bn", ["running", "batch"])
def test_model_buffers_modes_and_generators_are_untouched(bn, data):
    model = MetricModel(Conv4(1, 4), PrototypicalHead()).double().train()
    wrapper = L2GWrapper(model, 0.1)
    before, state = copy.deepcopy(wrapper.state_dict()), torch.get_rng_state()
    result = evaluate(wrapper, data, ways=3, queries=3, episodes=5, bn=bn)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), wrapper.state_dict().values(), strict=True))
    assert model.training and all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state) and result.bn == bn


def test_accuracy_by_a_plain_loop(data):
    from l2g_meta.data import Episodes

    model = MetricModel(nn.Flatten(), PrototypicalHead(distance="squared")).eval()
    stream = Episodes(data, ways=4, shots=1, queries=2, seed=(9, 0))
    expected = []
    for k in range(30):
        task = stream[k]
        nearest = torch.cdist(task.query_x.flatten(1), task.support_x.flatten(1)).argmin(1)
        expected.append(100 * (task.support_y[nearest] == task.query_y).double().mean().item())
    result = evaluate(model, data, ways=4, queries=2, episodes=30, episode_seed=9)
    assert result.accuracies == pytest.approx(expected)
    assert result.accuracy_mean == pytest.approx(np.mean(expected)) and result.accuracy_mean > 40
    assert result.ci95_runs is None and "one model" in str(result) and result.split == "test"


def test_streams_depend_on_the_episode_seed_alone(data):
    model = MetricModel(nn.Flatten(), PrototypicalHead())
    options = dict(ways=3, queries=3, episodes=20)
    a = evaluate(model, data, **options, episode_seed=1)
    torch.manual_seed(99)
    assert evaluate(model, data, **options, episode_seed=1).accuracies == a.accuracies
    assert evaluate(model, data, **options, episode_seed=2).accuracies != a.accuracies
    assert evaluate(model, data, **options, episode_seed=1, runs=2).accuracies[:20] == a.accuracies


def test_several_models_give_the_papers_interval_and_pairs_can_be_compared(data):
    results = [
        evaluate(MetricModel(nn.Flatten(), head), data, ways=3, queries=3, episodes=20)
        for head in (PrototypicalHead(), MatchingHead())
    ]
    both = over_models(results)
    means = [r.accuracy_mean for r in results]
    assert both.run_means == means and both.accuracy_mean == pytest.approx(np.mean(means))
    per_episode = np.mean([r.accuracies for r in results], axis=0)
    assert both.ci95_episodes == pytest.approx(confidence_interval(per_episode.tolist()))
    twice = over_models([results[0], results[0]])  # one model twice is not more evidence about its episodes
    assert twice.ci95_episodes == pytest.approx(results[0].ci95_episodes)
    assert paired_difference(twice, over_models([results[1]] * 2)) == pytest.approx(paired_difference(*results))
    with pytest.raises(L2GError, match="one BatchNorm policy, got running and batch"):
        over_models([results[0], replace(results[0], bn="batch")])
    assert both.ci95_runs == pytest.approx(12.7062 * np.std(means, ddof=1) / 2**0.5)
    assert "2 trained models, Student t" in str(both)
    mean, half = paired_difference(*results)
    assert mean == pytest.approx(means[0] - means[1]) and half >= 0
    with pytest.raises(L2GError, match="same ways of both, got 3 and 2; evaluate them alike"):
        paired_difference(
            results[0], evaluate(MetricModel(nn.Flatten(), MatchingHead()), data, ways=2, queries=3, episodes=20)
        )


def test_only_plain_models_are_scored_from_embeddings(data):
    class Reversed(MetricModel):
        def forward(self, task):
            return -super().forward(task)

    own = Reversed(nn.Flatten(), PrototypicalHead())
    options = dict(ways=3, queries=3, episodes=10)
    assert evaluate(own, data, **options).accuracies == evaluate(Opaque(own), data, **options).accuracies
    batch = MetricModel(nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten()), PrototypicalHead())
    batch = batch.double()
    assert evaluate(batch, data, **options).accuracies == evaluate(Opaque(batch), data, **options).accuracies


def test_nan_scores_are_no_result(data):
    model = MetricModel(Conv4(1, 4), PrototypicalHead()).double()
    nn.init.constant_(model.encoder.blocks[0].conv.weight, float("nan"))
    with pytest.raises(L2GError, match="need scores that are numbers, got NaN"):
        evaluate(model, data, ways=3, queries=3, episodes=2)
    with pytest.raises(L2GError, match="at least 1 episode"):
        evaluate(model, data, episodes=0)


class Lookup(nn.Module):
    """Takes a task for images without an error."""

    def forward(self, x):
        return x[0].flatten(1)


@pytest.mark.parametrize("wrap", [lambda encoder: encoder, lambda encoder: L2GWrapper(encoder, 0.1)])
@pytest.mark.parametrize("make", [lambda: Conv4(1, 4), lambda: torch.compile(Conv4(1, 4), backend="eager")])
def test_a_bare_encoder_is_told_to_be_wrapped(make, wrap, data):
    with pytest.raises(FitError, match=r"forward takes images; wrap it: MetricModel\(encoder, PrototypicalHead\(\)\)"):
        evaluate(wrap(make().double()), data, ways=3, queries=3, episodes=2)


def test_what_is_no_model_is_told_what_to_pass(data):
    l2g = L2GWrapper(MetricModel(Conv4(1, 4), PrototypicalHead()).double(), 0.1)
    with pytest.raises(FitError, match="an nn.Module, got <.*Learner.*>; take learner.module"):
        evaluate(l2g.clone(), data, ways=3, queries=3, episodes=2)
    assert evaluate(l2g.clone().module, data, ways=3, queries=3, episodes=2) == evaluate(
        l2g, data, ways=3, queries=3, episodes=2
    )
    with pytest.raises(FitError, match="a class is called first"):
        evaluate(Conv4, data, ways=3, queries=3, episodes=2)
    with pytest.raises(FitError, match=r"need scores of shape \(n_query, n_way\) = \(9, 3\) from Lookup.forward"):
        evaluate(Lookup(), data, ways=3, queries=3, episodes=2)
