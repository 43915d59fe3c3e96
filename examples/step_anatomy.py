"""What does L2G's inner step ask of a model, and does a step on one task help another, before and after training by it?

    python examples/step_anatomy.py --run RUN [RUN ...] [--alpha 0.1 ...] [--pairs 100]
    python examples/step_anatomy.py --smoke

To first order L(θ − α g_i; T_j) = L(θ; T_j) − α g_i·g_j: L2G rewards gradients of disjoint tasks that agree. Where the
two tasks of a pair are as good as independent, the mean of g_i·g_j is the square of the mean gradient, |ḡ|². Printed
are both, |g_i|², to which the second order is proportional, and the loss of T_j at θ and by how much a step on T_i
changes it; means over pairs of training tasks, ± 95 %.
"""

import argparse
from pathlib import Path

import torch

from l2g_meta import L2GWrapper
from l2g_meta.alignment import task_gradient
from l2g_meta.build import build_data, build_pairs, load_run
from l2g_meta.config import Config
from l2g_meta.functional import confidence_interval
from l2g_meta.training import train

FIRST = 10**6  # of the pairs of the stream: not those of training


def mean(values: torch.Tensor) -> str:
    """Of n values, with its 95 % interval."""
    return f"{values.mean():.3f} ± {confidence_interval(values):.3f}"


def main() -> None:
    """Prints a row for each run and α."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", help="folders made by `l2g train`, l2g or episodic")
    parser.add_argument("--alpha", type=float, nargs="+", help="of the step (default: the run's own)")
    parser.add_argument("--pairs", type=int, default=100, help="of tasks (default: 100)")
    parser.add_argument("--smoke", action="store_true", help="a run of two updates, to see that everything works")
    args = parser.parse_args()
    runs, n = args.run, args.pairs
    if args.smoke:
        runs, n = [Path("runs/anatomy-smoke")], 2
        config = Config(pairs=1, queries=2, iterations=2, eval_every=2, eval_episodes=4, device="cpu")
        train(config, runs[0], resume=runs[0].exists())
    if runs is None:
        parser.error("need --run RUN, or --smoke")

    row = "{:24} {:>6} {:>16} {:>8} {:>8} {:>12} {:>18}".format
    print(row("", "α", "g_i·g_j", "|ḡ|²", "|g_i|²", "L(θ; T_j)", "L(θ'; T_j) − it"))
    for run in runs:
        trained, config = load_run(run, device="cpu")
        pairs = build_pairs(config, build_data(config, "train"), torch.device("cpu"))
        tasks = [task for k in range(n) for task in pairs[FIRST + k]]
        trained.train()
        g = torch.stack([task_gradient(trained, task)[1].double() for task in tasks]).unflatten(0, (n, 2))
        products = g[:, 0] @ g[:, 1].T  # (n, n): T_i of one pair with T_j of another; the diagonal are the pairs
        of_pairs = products.diagonal()
        independent = (products.sum() - of_pairs.sum()) / (n * (n - 1))  # |ḡ|², without bias
        for alpha in args.alpha or [config.inner_lr]:
            wrapper = L2GWrapper(trained.module, alpha, unit_step=config.unit_step)
            losses = []
            for task_i, task_j in zip(tasks[0::2], tasks[1::2], strict=True):
                learner = wrapper.adapted(task_i)
                with torch.no_grad():
                    losses.append(torch.stack([wrapper.loss(task_j), learner.loss(task_j)]))
            before, after = torch.stack(losses).double().T
            print(row(
                run.name, f"{alpha:g}", mean(of_pairs), f"{independent:.3f}", f"{g[:, 0].square().sum(1).mean():.1f}",
                f"{before.mean():.3f}", mean(after - before),
            ))  # fmt: skip


if __name__ == "__main__":
    main()
