import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from l2g_meta import Conv4
from l2g_meta.inner import clone


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.ones(3))
        self.register_parameter("nothing", None)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))) * self.scale


MODULES = {
    "conv4": (lambda: Conv4(1, 4), (4, 1, 16, 16)),
    "tied": (Tied, (4, 3)),
    "lstm": (lambda: nn.LSTM(3, 5, num_layers=2, bidirectional=True), (2, 4, 3)),
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2))), (4, 3)),
}


def output(module, x):
    y = module(x)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("name", MODULES)
def test_built_in_clone_and_update_equal_learn2learns_to_the_last_bit(name):
    utils = clone.require_learn2learn().utils
    make, shape = MODULES[name]
    original, x = make(), torch.randn(shape)
    results = []
    for clone_module, update_module in (
        (utils.clone_module, utils.update_module),
        (clone.clone_module, clone.update_module),
    ):
        module = copy.deepcopy(original)
        learner = clone_module(module)
        for _ in range(2):  # two inner steps, one parameter left out
            parameters = list(learner.parameters())
            g = torch.autograd.grad(output(learner, x).square().mean(), parameters, create_graph=True)
            update_module(learner, [None if k == 1 else -0.1 * u for k, u in enumerate(g)])
        loss = output(learner, x).square().mean()
        results.append(
            [loss, *learner.parameters(), *torch.autograd.grad(loss, list(module.parameters())), *module.buffers()]
        )
    theirs, ours = results
    assert len(theirs) == len(ours) and all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_a_clone_shares_buffers_and_keeps_its_type():
    module = Conv4(1, 4)
    twin = clone.clone_module(module)
    assert type(twin) is Conv4 and twin.blocks[0].norm.running_mean is module.blocks[0].norm.running_mean
    assert twin.blocks[0].conv.weight is not module.blocks[0].conv.weight


def test_updates_must_match_the_parameters():
    with pytest.raises(ValueError, match="argument 2 is shorter|zip"):
        clone.update_module(clone.clone_module(Tied()), [None])


def test_the_backend_is_learn2learns_where_installed(either_backend):
    from_learn2learn = clone.backend()[0].__wrapped__ is not clone.clone_module
    assert from_learn2learn is (either_backend == "learn2learn")


def test_missing_learn2learn_is_named_with_the_line_that_installs_it(monkeypatch):
    clone.require_learn2learn.cache_clear()
    monkeypatch.setitem(sys.modules, "learn2learn", None)
    with pytest.raises(ImportError, match="pip install --config-settings=--build-option=build_ext learn2learn==0.2.0"):
        clone.require_learn2learn()
    clone.require_learn2learn.cache_clear()


def test_import_loads_nothing_heavy_and_prints_nothing():
    code = (
        "import sys, torch; before = set(sys.modules); import l2g_meta; "
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before}"
        " & {'learn2learn', 'torchvision', 'matplotlib', 'sklearn', 'gym', 'tqdm', 'PIL'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and done.stderr == ""


def test_gyms_banner_stays_unseen():
    pytest.importorskip("learn2learn")
    code = "from l2g_meta.inner.clone import backend; backend()"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert "Gym" not in done.stdout + done.stderr


def test_a_broken_learn2learn_is_replaced_with_a_warning(monkeypatch):
    def broken():
        raise ImportError("this needs learn2learn (broken)")

    clone.backend.cache_clear()
    monkeypatch.setattr(clone, "has_learn2learn", lambda: True)
    monkeypatch.setattr(clone, "require_learn2learn", broken)
    with pytest.warns(UserWarning, match="using the built-in clone and update: .*broken"):
        assert clone.backend()[0].__wrapped__ is clone.clone_module
    clone.backend.cache_clear()
