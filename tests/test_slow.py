"""Full-length variants, left out of the CI set: `make slow`."""

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from l2g_meta import Conv4, L2GWrapper, MetricModel, PrototypicalHead, Task
from l2g_meta.models.heads import HEADS
from l2g_meta.testing import check_head
from l2g_meta.training.objectives import l2g, meta_gradient

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_the_laws_hold_for_other_weights_and_tasks(head, seed):
    check_head(head, seed=seed)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to measure memory")
def test_resident_memory_is_flat_over_200_full_size_meta_steps():
    wrapper = L2GWrapper(MetricModel(Conv4(3), PrototypicalHead()), 0.01)
    x, y = torch.randn(2, 10, 3, 84, 84), torch.arange(10) % 5
    pair = tuple(Task(x[k, :5], y[:5], x[k, 5:], y[5:], 5) for k in range(2))
    resident = []  # pages
    for _ in range(200):
        wrapper.zero_grad()
        meta_gradient(l2g, wrapper, [pair])
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
    # The lowest of a window: where the allocator puts a graph, and so the peak, wanders from step to step.
    growth = (min(resident[180:]) - min(resident[20:40])) * resource.getpagesize()
    assert growth < 20e6


def test_the_demo_learns_to_tell_unseen_characters_apart(tmp_path):
    quickstart = Path(__file__).parent.parent / "examples" / "quickstart.py"
    done = subprocess.run([sys.executable, quickstart], cwd=tmp_path, capture_output=True, text=True, check=True)
    for name in ("Episodic, 2", "Episodic, 4", "L2G, Algorithm 1", "L2G, mix 0.5"):
        five, twenty = map(float, re.findall(r"([\d.]+) ±", re.search(f"^{name}.*", done.stdout, re.M)[0]))
        assert five > 50 and twenty > 20, done.stdout  # chance: 20 and 5
