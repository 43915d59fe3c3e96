"""Add a metric head, prove that it is sound, and compare it under the three objectives.

    python examples/own_head.py [--smoke]

From the command line, in this folder, the same head is ``l2g train --head own_head:ManhattanHead``.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from l2g_meta import Conv4, MetricModel
from l2g_meta.data import load
from l2g_meta.evaluation.episodes import evaluate, paired_difference
from l2g_meta.models import functional as f
from l2g_meta.testing import check_head
from l2g_meta.training.config import Config
from l2g_meta.training.loop import train


class ManhattanHead(nn.Module):
    """Score = −Σ w_k √((q_k − c_k)² + ε): a smooth L1 distance to the class mean, with learned weights w.

    Args:
        dim: number of features; ``l2g train`` and ``check_head`` fill it in.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.log_weight = nn.Parameter(torch.full((dim,), -2.0))

    def forward(self, support: Tensor, support_y: Tensor, query: Tensor, n_way: int) -> Tensor:
        """Features (n_support, …), (n_query, …) to scores (n_query, n_way)."""
        c = f.prototypes(support.flatten(1), support_y, n_way)
        difference = query.flatten(1)[:, None] - c  # (n_query, n_way, dim)
        return -(self.log_weight.exp() * (difference.square() + 1e-6).sqrt()).sum(-1)

    def loss_fn(self, scores: Tensor, query_y: Tensor) -> Tensor:
        """Negative log-likelihood; without this method it would be cross-entropy all the same."""
        return f.nll_loss(scores, query_y)


def main() -> None:
    """Checks the head, trains it three ways, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two updates, ten episodes")
    smoke = parser.parse_args().smoke

    report = check_head(ManhattanHead)
    print("holds:", ", ".join(report.holds))
    print("findings:", report.findings or "none")

    iterations, episodes = (2, 10) if smoke else (200, 600)
    train_data, validation, test = (load("glyphs", split) for split in ("train", "validation", "test"))
    results = {}
    objectives = {"episodic": {}, "maml": {"inner_lr": 0.003}, "l2g": {"inner_lr": 0.003, "mix": 0.5}}
    for method, step in objectives.items():
        config = Config(method=method, iterations=iterations, eval_every=iterations, eval_episodes=episodes, **step)
        torch.manual_seed(0)
        model = MetricModel(Conv4(1), ManhattanHead(64), image_shape=(1, 28, 28))
        with tempfile.TemporaryDirectory() as folder:
            wrapper = train(config, Path(folder) / method, data=train_data, validation=validation, model=model)
        results[method] = evaluate(wrapper, test, queries=5, episodes=episodes)
        print(f"{method:10} {results[method]}")

    for other in ("episodic", "maml"):
        mean, half = paired_difference(results["l2g"], results[other])
        print(f"l2g − {other:8} {mean:+.2f} ± {half:.2f} points, over the same test episodes")


if __name__ == "__main__":
    main()
