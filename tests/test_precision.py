"""bf16 by autocast: products in bfloat16, everything else in float32, and a meta-gradient close to float32's."""

import copy

import pytest
import torch

from l2g_meta import Conv4, L2GWrapper, MetricModel, PrototypicalHead, RelationHead, Task, relation_embedding
from l2g_meta.cli.main import main
from l2g_meta.testing import random_task
from l2g_meta.training.build import set_precision
from l2g_meta.training.objectives import l2g, meta_gradient

HEADS = {
    "prototypical": lambda: MetricModel(Conv4(1, 8), PrototypicalHead()),
    "relation": lambda: MetricModel(relation_embedding(1, 8), RelationHead(8, 7)),
}


@pytest.mark.parametrize("mix", [0.0, 0.5])
@pytest.mark.parametrize("head", HEADS)
def test_meta_gradient_is_close_and_in_float32(head, mix):
    model = HEADS[head]()
    pair = [task._replace(support_x=task.support_x.float(), query_x=task.query_x.float()) for task in
            (random_task((1, 28, 28), n_way=5), random_task((1, 28, 28), n_way=5))]  # fmt: skip
    gradients, losses = [], []
    for dtype in (None, torch.bfloat16):
        wrapper = L2GWrapper(copy.deepcopy(model), 0.01, autocast=dtype, mix=mix)
        losses.append(meta_gradient(l2g, wrapper, [pair]).loss)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in wrapper.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in wrapper.parameters()]))
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0.05)
    exact, low = gradients
    assert (exact @ low) / (exact.norm() * low.norm()) > 0.8


def test_second_order_is_there():
    """The Hessian term in bfloat16 points the same way as in float32."""
    model = HEADS["prototypical"]()
    pair = [task._replace(support_x=task.support_x.float(), query_x=task.query_x.float()) for task in
            (random_task((1, 28, 28), n_way=5), random_task((1, 28, 28), n_way=5))]  # fmt: skip
    terms = []
    for dtype in (None, torch.bfloat16):
        found = []
        for first_order in (False, True):
            wrapper = L2GWrapper(copy.deepcopy(model), 0.1, autocast=dtype, first_order=first_order)
            meta_gradient(l2g, wrapper, [pair])
            found.append(torch.cat([p.grad.flatten() for p in wrapper.parameters()]))
        terms.append(found[0] - found[1])
    exact, low = terms
    assert (exact @ low) / (exact.norm() * low.norm()) > 0.8


def test_flag_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    flags = "--iterations 1 --pairs 1 --queries 1 --eval-episodes 1 --image-size 28 --device cpu".split()
    assert main(["train", *flags, "--precision", "bf16", "--out", str(tmp_path / "run")]) == 0
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    set_precision("tf32")
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
    set_precision("fp32")


def test_a_callers_own_autocast_stays():
    """Without ``autocast`` the wrapper neither turns one on nor the caller's off."""
    seen = []
    model = MetricModel(Conv4(1, 4), PrototypicalHead())
    model.encoder.blocks[0].conv.register_forward_hook(lambda *given: seen.append(given[-1].dtype))
    x, y = torch.randn(2, 6, 1, 16, 16), torch.arange(6) % 3
    pair = [Task(x[k, :3], y[:3], x[k, 3:], y[3:], 3) for k in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        L2GWrapper(model, 0.1)(*pair)
    L2GWrapper(model, 0.1)(*pair)
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 2
