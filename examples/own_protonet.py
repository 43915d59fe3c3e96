"""Wrap your own ProtoNet: a plain ``nn.Module`` with ``forward(task) -> scores``, nothing inherited.

python examples/own_protonet.py            # a minute on a CPU
python examples/own_protonet.py --smoke    # seconds
"""

import argparse

import torch
from torch import nn

from l2g_meta import L2GWrapper, Task
from l2g_meta.data import TaskPairs, load
from l2g_meta.evaluation.episodes import evaluate


class MyProtoNet(nn.Module):
    """Any network that scores queries against supports."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(),
        )  # fmt: skip

    def forward(self, task: Task) -> torch.Tensor:
        """Scores (n_query, n_way): minus the distance of each query to each class's mean."""
        support, query = self.net(task.support_x), self.net(task.query_x)
        means = torch.stack([support[task.support_y == c].mean(0) for c in range(task.n_way)])
        return -(query[:, None] - means).square().sum(-1).add(1e-6).sqrt()


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--smoke", action="store_true", help="two updates, ten episodes")
updates, episodes = (2, 10) if parser.parse_args().smoke else (300, 600)

torch.manual_seed(0)
pairs = TaskPairs(load("glyphs", "train"), ways=5, shots=1, queries=5, seed=0)
l2g = L2GWrapper(MyProtoNet(), inner_lr=0.003, mix=0.5)
optimizer = torch.optim.Adam(l2g.parameters(), lr=1e-3)

for k in range(updates):
    task_i, task_j = pairs[k]  # two tasks without a common class
    loss = l2g(task_i, task_j)  # 0.5 L(θ − α∇L(θ; T_i); T_j) + 0.5 L(θ; T_i)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if (k + 1) % 50 == 0:
        print(f"update {k + 1}: loss {loss.item():.3f}")

print(evaluate(l2g, load("glyphs", "test"), ways=5, shots=1, queries=5, episodes=episodes))
