"""From learn2learn's MAML loop to L2G: both loops on the same classes, network and number of tasks.

    python examples/from_maml.py [--smoke]

The first half needs learn2learn; without it, it says so and leaves that half out.
"""

import argparse
import time

import torch
from torch import nn, optim

from l2g_meta import Conv4, L2GWrapper, MetricModel, PrototypicalHead, Task
from l2g_meta.data import Episodes, TaskPairs, load
from l2g_meta.evaluation.episodes import evaluate
from l2g_meta.inner.clone import has_learn2learn, require_learn2learn
from l2g_meta.models import functional as f

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--smoke", action="store_true", help="two updates, ten episodes")
updates, episodes = (2, 10) if parser.parse_args().smoke else (150, 600)
ways, shots, queries, seed = 5, 1, 5, 0
train, test = load("glyphs", "train"), load("glyphs", "test")


def fast_adapt(task: Task, learner: nn.Module) -> tuple[torch.Tensor, float]:
    """MAML's inner loop: adapt to the supports, then loss and accuracy (%) of the queries of the same task."""
    loss = nn.functional.cross_entropy
    learner.adapt(loss(learner(task.support_x), task.support_y))
    scores = learner(task.query_x)
    return loss(scores, task.query_y), 100 * f.accuracy(scores, task.query_y).item()


def maml() -> None:
    """Before: learn2learn's MAML around a classifier of five outputs."""
    l2l = require_learn2learn()  # import learn2learn as l2l, without the notice of its dependency Gym

    torch.manual_seed(seed)
    model = nn.Sequential(Conv4(1), nn.Flatten(), nn.Linear(64, ways))
    maml = l2l.algorithms.MAML(model, lr=0.5)
    optimizer = optim.Adam(maml.parameters(), 0.003)
    tasks = Episodes(train, ways=ways, shots=shots, queries=queries, seed=seed)
    for k in range(updates):
        optimizer.zero_grad()
        for b in range(4):
            learner = maml.clone()
            loss, _ = fast_adapt(tasks[4 * k + b], learner)  # both losses on one task
            (loss / 4).backward()
        optimizer.step()

    tasks = Episodes(test, ways=ways, shots=shots, queries=queries, seed=seed)
    accuracies = [fast_adapt(tasks[k], maml.clone())[1] for k in range(episodes)]  # adapts to every test task
    print(f"MAML: {sum(accuracies) / episodes:.2f} ± {f.confidence_interval(accuracies):.2f} %", end="")


def l2g() -> None:
    """After: L2GWrapper around a network and a metric head, which has no number of classes."""
    torch.manual_seed(seed)
    model = MetricModel(Conv4(1), PrototypicalHead())
    l2g = L2GWrapper(model, inner_lr=0.003)
    optimizer = optim.Adam(l2g.parameters(), 0.001)
    pairs = TaskPairs(train, ways=ways, shots=shots, queries=queries, seed=seed)
    for k in range(updates):
        optimizer.zero_grad()
        for b in range(2):
            task_i, task_j = pairs[2 * k + b]  # no common class
            learner = l2g.clone()
            loss_i = learner.loss(task_i)
            learner.adapt(loss_i)
            loss = 0.5 * learner.loss(task_j) + 0.5 * loss_i  # mix=0.5; Algorithm 1 as published: mix=0.0
            (loss / 2).backward()
        optimizer.step()

    result = evaluate(l2g, test, ways=ways, shots=shots, queries=queries, episodes=episodes)  # adapts to nothing
    print(f"L2G: {result.accuracy_mean:.2f} ± {result.ci95_episodes:.2f} %", end="")


for train_and_test in (maml, l2g) if has_learn2learn() else (l2g,):
    began = time.process_time()
    train_and_test()
    print(f", {ways}-way {shots}-shot on unseen scripts; {time.process_time() - began:.0f} s of processor time")
if not has_learn2learn():
    print("MAML is left out: learn2learn is not installed. docs/getting-started.md has the line that adds it.")
