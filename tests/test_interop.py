"""Other libraries' own networks, tasks and trainers: the examples that use them, and what those examples promise."""

import random
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from l2g_meta import L2GWrapper, Task
from l2g_meta.data import ClassDataset, Episodes
from l2g_meta.evaluation.episodes import evaluate

EXAMPLES = Path(__file__).parent.parent / "examples"
PEERS = {"learn2learn_protonet": "learn2learn", "easyfsl_prototypical": "easyfsl", "lightning_training": "lightning"}


def run(script: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Runs a script in this process, which has imported what takes long."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    python = random.getstate()
    try:
        with torch.random.fork_rng():
            runpy.run_path(str(script), run_name="__main__")
    finally:
        random.setstate(python)


@pytest.mark.parametrize("name", PEERS)
def test_l2g_changes_at_most_five_lines(name):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    marked = [line for line in text.splitlines() if line.endswith("# L2G")]
    assert 3 <= len(marked) <= 5
    assert marked[0].startswith("from l2g_meta import") and text.count("l2g_meta") == 1
    assert sum("inner_lr=0.003, mix=0.5" in line for line in marked) == 1
    unmarked = set(text.splitlines()) - set(marked)
    assert not [line for line in unmarked if "l2g" in line.split("#")[0] and "L2G" not in line and " = " in line]


@pytest.mark.parametrize("name", PEERS)
def test_what_stood_before_runs_as_well(name, tmp_path, monkeypatch):
    pytest.importorskip(PEERS[name])
    lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()
    before = [line.replace("# before: ", "") for line in lines if not line.endswith("# L2G")]
    script = tmp_path / f"{name}.py"
    script.write_text("\n".join(before), encoding="utf-8")
    assert "l2g_meta" not in script.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    run(script, monkeypatch, "--smoke")


def test_lightning_resumes_to_the_same_bits(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    script = EXAMPLES / "lightning_training.py"
    run(script, monkeypatch, "--smoke", "--epochs", 3, "--out", "whole")
    run(script, monkeypatch, "--smoke", "--epochs", 1, "--out", "parts")
    run(script, monkeypatch, "--smoke", "--epochs", 3, "--out", "parts", "--resume", "--workers", 1)
    whole, parts = (torch.load(Path(out, "last.ckpt"), weights_only=True) for out in ("whole", "parts"))
    assert whole["global_step"] == parts["global_step"] == 9
    assert whole["state_dict"].keys() == parts["state_dict"].keys() >= {"l2g.inner_lr.value"}
    torch.testing.assert_close(parts["state_dict"], whole["state_dict"], rtol=0, atol=0)


def test_classifiers_with_easyfsls_two_calls_are_wrapped_as_they_are():
    methods = pytest.importorskip("easyfsl.methods")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).double()

    class OnTasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = methods.PrototypicalNetworks(network)

        def forward(self, task):
            self.classifier.process_support_set(task.support_x, task.support_y)
            return self.classifier(task.query_x)

    x, y = torch.randn(2, 12, 1, 8, 8, dtype=torch.double), torch.arange(12) % 3
    pair = [(x[k, :3], y[:3], x[k, 3:], y[3:], ["class", "ids"]) for k in (0, 1)]
    gradients = []
    for model in (OnTasks(), methods.PrototypicalNetworks(network)):
        loss = L2GWrapper(model, inner_lr=0.1, mix=0.5)(*pair)
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)
    task = Task.of(pair[0])
    assert L2GWrapper(methods.PrototypicalNetworks(network), 0.1).adapted(task)(task).shape == (9, 3)


def test_easyfsls_classifiers_are_evaluated():
    methods = pytest.importorskip("easyfsl.methods")
    y = torch.arange(60) % 6
    data = ClassDataset(torch.nn.functional.one_hot(y).float(), y)
    result = evaluate(methods.PrototypicalNetworks(nn.Flatten()), data, ways=5, shots=1, queries=2, episodes=5)
    assert result.accuracy_mean == 100


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_takes_the_epoch_that_is_set_after_its_iterator_was_made(workers):
    episodes = Episodes(ClassDataset(torch.randn(20, 3), torch.arange(20) % 4), ways=2, shots=1, queries=1, length=3)
    loader = episodes.loader(workers)
    iterator = iter(loader)
    loader.sampler.set_epoch(2)
    whole = Episodes(episodes.source.dataset, ways=2, shots=1, queries=1)
    for k, task in zip((6, 7, 8), iterator, strict=True):
        assert torch.equal(task.query_x, whole[k].query_x)
