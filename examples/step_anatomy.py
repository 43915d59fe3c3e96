"""What does L2G's inner step ask of a model, and is the trained model the better one before or after such a step?

    python examples/step_anatomy.py --run RUN [RUN ...] [--pairs 100]
    python examples/step_anatomy.py --smoke

To first order L(θ − α g_i; T_j) = L(θ; T_j) − α g_i·g_j: L2G rewards gradients of disjoint tasks that agree. Where the
two tasks of a pair are as good as independent, the mean of g_i·g_j is the square of the mean gradient, |ḡ|²: what is
rewarded is a mean gradient that has not gone to 0, a θ from which one more step would help. This measures both sides,
and tests the model at θ and at θ − α ḡ.
"""

import argparse
from pathlib import Path

import torch

from l2g_meta import L2GWrapper
from l2g_meta.build import build_data, build_pairs, load_run
from l2g_meta.config import Config
from l2g_meta.data import TaskPairs
from l2g_meta.evaluation import evaluate, paired_difference
from l2g_meta.training import train


def gradients(wrapper: L2GWrapper, pairs: TaskPairs, n: int) -> torch.Tensor:  # (n, 2, n_parameters)
    """Of L(θ; T_i) and L(θ; T_j) of n pairs, in float64."""
    parameters = list(wrapper.module.parameters())
    found = [
        torch.cat([g.flatten() for g in torch.autograd.grad(wrapper.loss(task), parameters)])
        for k in range(n)
        for task in pairs[10**6 + k]  # not those of training
    ]
    return torch.stack(found).double().unflatten(0, (n, 2))


def products(g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean g_i·g_j over the pairs, its standard error, and the mean over tasks of different pairs, that is |ḡ|²."""
    each = g[:, 0] @ g[:, 1].T  # (n, n): T_i of one pair, T_j of another; the diagonal are the pairs
    n = len(each)
    return each.diagonal().mean(), each.diagonal().std() / n**0.5, (each.sum() - each.trace()) / (n * (n - 1))


def main() -> None:
    """Prints a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, nargs="+", help="folders made by `l2g train`, l2g or episodic")
    parser.add_argument("--pairs", type=int, default=100, help="of tasks (default: 100)")
    parser.add_argument("--smoke", action="store_true", help="a run of two updates, to see that everything works")
    args = parser.parse_args()
    runs, n = args.run, args.pairs
    if args.smoke:
        runs, n = [Path("runs/anatomy-smoke")], 2
        train(Config(pairs=1, queries=2, iterations=2, eval_every=2, eval_episodes=4, device="cpu"), runs[0])
    if runs is None:
        parser.error("need --run RUN, or --smoke")

    row = "{:28} {:>6} {:>16} {:>14} {:>8} {:>8} {:>16}".format
    print(row("", "α", "g_i·g_j", "|ḡ|²", "at θ", "at θ−αḡ", "difference"))
    for run in runs:
        wrapper, config = load_run(run, device="cpu")
        pairs = build_pairs(config, build_data(config, "train"), torch.device("cpu"))
        g = gradients(wrapper.train(), pairs, n)
        of_pairs, error, of_different = products(g)

        test, results = build_data(config, "test"), []
        mean = g.mean((0, 1))  # ḡ
        step = config.inner_lr * mean / (mean.norm() if config.unit_step else 1)
        start = torch.nn.utils.parameters_to_vector(wrapper.module.parameters()).detach()
        for at in (start, start - step.float()):
            torch.nn.utils.vector_to_parameters(at, wrapper.module.parameters())
            results.append(evaluate(
                wrapper, test, ways=config.outer_ways, shots=config.outer_shots, queries=config.queries,
                episodes=10 if args.smoke else 600, bn="batch",  # the running statistics are those of θ
            ))  # fmt: skip
        gain, half = paired_difference(results[1], results[0])
        print(row(
            run.name, config.inner_lr, f"{of_pairs:.3f} ± {1.96 * error:.3f}", f"{of_different:.3f}",
            *(f"{result.accuracy_mean:.2f}" for result in results), f"{gain:+.2f} ± {half:.2f}",
        ))  # fmt: skip


if __name__ == "__main__":
    main()
