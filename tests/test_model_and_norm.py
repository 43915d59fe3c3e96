import copy

import pytest
import torch
from torch import nn

from l2g_meta import Conv4, MatchingHead, MetricModel, PrototypicalHead, RelationHead, batchnorm_policy
from l2g_meta.errors import FitError
from l2g_meta.models.backbones import BACKBONES, relation_embedding
from l2g_meta.models.metric import build_head, feature_shape
from l2g_meta.testing import random_task


def test_backbones_have_their_published_shapes():
    assert feature_shape(Conv4(3), (3, 84, 84)) == (64, 5, 5)
    assert feature_shape(relation_embedding(3), (3, 84, 84)) == (64, 21, 21)
    assert sum(p.numel() for p in Conv4(3).parameters()) == 64 * 27 + 3 * 64 * 64 * 9 + 4 * 128  # no conv biases
    assert set(BACKBONES) == {"conv4", "conv4-32", "conv4-relation", "resnet12"}
    assert feature_shape(BACKBONES["conv4-32"](3), (3, 84, 84)) == (32, 5, 5)
    with pytest.raises(FitError, match="pools in 0 … 4"):
        Conv4(pools=5)


def test_construction_checks_the_fit_and_leaves_no_trace():
    encoder, state = Conv4(1, 4), torch.get_rng_state()
    before = copy.deepcopy(encoder.state_dict())
    MetricModel(encoder, PrototypicalHead(), image_shape=(1, 16, 16))
    assert torch.equal(torch.get_rng_state(), state) and encoder.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), encoder.state_dict().values(), strict=True))
    with pytest.raises(FitError, match=r"RelationHead needs feature maps \(4, 8, 8\), the encoder gives \(4, 4, 4\)"):
        MetricModel(Conv4(1, 4, pools=2), RelationHead(4, 8), image_shape=(1, 16, 16))
    with pytest.raises(FitError, match=r"Conv4 does not take images of shape \(3, 16, 16\)"):
        MetricModel(encoder, PrototypicalHead(), image_shape=(3, 16, 16))


def test_without_image_shape_the_first_task_is_checked():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(7, 3)

        def forward(self, support, support_y, query, n_way):
            return self.fc(query.flatten(1))

    task = random_task((1, 16, 16))
    with pytest.raises(FitError, match=r"Linear fails on the encoder's features of shape \(4, 1, 1\)"):
        MetricModel(Conv4(1, 4), Linear()).double()(task)
    wide = Linear()
    wide.fc = nn.Linear(4, 3)
    with pytest.raises(FitError, match=r"scores of shape \(n_query, n_way\) = \(6, 2\), Linear gives \(6, 3\)"):
        MetricModel(Conv4(1, 4), wide).double()(task)


def test_heads_are_built_from_a_feature_shape():
    assert build_head(RelationHead, (8, 4, 5)).feature_shape == (8, 4, 5)
    assert isinstance(build_head(MatchingHead, (8, 4, 4), temperature=0.5), MatchingHead)


def test_a_head_without_a_loss_gets_cross_entropy():
    model = MetricModel(Conv4(1, 4), nn.Identity())
    assert model.loss_fn is nn.functional.cross_entropy


def test_supports_and_queries_share_one_pass():
    model, task = MetricModel(Conv4(1, 4), PrototypicalHead()).double(), random_task((1, 16, 16))
    z = model.encoder(torch.cat([task.support_x, task.query_x]))
    expected = model.head(z[:2], task.support_y, z[2:], 2)
    torch.testing.assert_close(model(task), expected)


@pytest.mark.parametrize("policy", ["running", "batch"])
def test_policies_restore_everything(policy):
    model, task = MetricModel(Conv4(1, 4), PrototypicalHead()).double(), random_task((1, 16, 16))
    model.encoder.blocks[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    with batchnorm_policy(model, policy), pytest.raises(ZeroDivisionError):
        model(task)
        raise ZeroDivisionError
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_running_is_inductive_and_batch_is_transductive():
    model, task = MetricModel(Conv4(1, 4), PrototypicalHead()).double(), random_task((1, 16, 16))
    model(task)  # some running statistics
    one = task._replace(query_x=task.query_x[:1], query_y=task.query_y[:1])
    for policy, same in (("running", True), ("batch", False)):
        with batchnorm_policy(model, policy):
            assert torch.allclose(model(task)[:1], model(one)) is same
    with batchnorm_policy(model, "batch"):
        batch = model(task)
    torch.testing.assert_close(batch, model.train()(task))


def test_unknown_policy():
    with pytest.raises(FitError, match="policy of running or batch, got 'frozen'"), batchnorm_policy(Conv4(), "frozen"):
        pass


def test_a_head_of_another_signature_is_refused():
    class Short(nn.Module):
        def forward(self, support, query): ...

    with pytest.raises(FitError, match=r"need a head with forward\(support, .* Short has forward\(support, query\)"):
        MetricModel(nn.Flatten(), Short(), image_shape=(1, 4, 4))


@pytest.mark.parametrize(
    "parts, need",
    [
        (
            (Conv4, PrototypicalHead()),
            r"need a module as encoder, got <class .*; make one of the class: Conv4\(",
        ),
        ((Conv4(1), "prototypical"), "need a module as head, got 'prototypical'; give the head itself"),
        ((Conv4(1), None), "need a module as head, got None"),
    ],
    ids=["a class", "a name", "nothing"],
)
def test_what_is_no_module_is_refused(parts, need):
    with pytest.raises(FitError, match=need):
        MetricModel(*parts)


def test_images_of_another_number_of_dimensions_are_named():
    with pytest.raises(FitError, match=r"Conv4 does not take images of shape \(1,\)"):
        feature_shape(Conv4(1, 4), (1,))
