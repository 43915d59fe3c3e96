"""What does L2G's inner step ask of a model, and is it what the model gets better at?

    python examples/step_anatomy.py --base EPISODIC-RUN --run RUN [RUN ...] [--alpha 0.1 ...] [--pairs 100]
    python examples/step_anatomy.py --smoke

To first order L(θ − α g_i; T_j) = L(θ; T_j) − α g_i·g_j: L2G rewards gradients of disjoint tasks that agree. Where the
two tasks of a pair are as good as independent, the mean of g_i·g_j is the square of the mean gradient, |ḡ|². Printed
are both and |g_i|², to which the second order is proportional; the loss of T_j at θ, by which a model is tested, and at
θ' after a step on T_i, by which L2G trains; and how far the latter is above that of the base after the same step.
Means over pairs of training tasks, ± 95 %, for a model that is not trained, the base, and each run.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from l2g_meta import L2GWrapper, Task
from l2g_meta.evaluation.alignment import task_gradient
from l2g_meta.models.functional import confidence_interval
from l2g_meta.training.build import build_data, build_model, build_pairs, build_wrapper, load_run
from l2g_meta.training.config import Config
from l2g_meta.training.loop import train

FIRST = 10**6  # of the pairs of the stream: not those of training
ROW = "{:24} {:>6} {:>18} {:>8} {:>8} {:>11} {:>12} {:>16}".format

Pairs = list[tuple[Task, Task]]


def mean(values: Tensor) -> str:
    """Of n values, with its 95 % interval."""
    return f"{values.mean():.3f} ± {confidence_interval(values):.3f}"


def losses(wrapper: L2GWrapper, alpha: float, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Of T_j, before a step of α on T_i and after it, (n,) each."""
    wrapper = L2GWrapper(wrapper.module, alpha).train()
    found = []
    for task_i, task_j in pairs:
        learner = wrapper.adapted(task_i)
        with torch.no_grad():
            found.append(torch.stack([wrapper.loss(task_j), learner.loss(task_j)]))
    before, after = torch.stack(found).double().T
    return before, after


def gradients(wrapper: L2GWrapper, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """g_i·g_j and |g_i|² of each pair, (n,) each, and |ḡ|²."""
    n = len(pairs)
    tasks = [task for pair in pairs for task in pair]
    g = torch.stack([task_gradient(wrapper.train(), task)[1].double() for task in tasks]).unflatten(0, (n, 2))
    products = g[:, 0] @ g[:, 1].T  # (n, n): T_i of one pair with T_j of another; the diagonal are the pairs
    of_pairs = products.diagonal()
    independent = (products.sum() - of_pairs.sum()) / (n * (n - 1))  # |ḡ|², without bias
    return of_pairs, g[:, 0].square().sum(1), independent


def main() -> None:
    """Prints a row for each model and α."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of the episodic run that they are held against")
    parser.add_argument("--run", type=Path, nargs="+", help="folders made by `l2g train`")
    parser.add_argument("--alpha", type=float, nargs="+", help="of the step (default: each run's own)")
    parser.add_argument("--pairs", type=int, default=100, help="of tasks (default: 100)")
    parser.add_argument("--smoke", action="store_true", help="runs of two updates, to see that everything works")
    args = parser.parse_args()
    base, runs, n = args.base, args.run, args.pairs
    if args.smoke:
        base, runs, n = Path("runs/anatomy-smoke-episodic"), [Path("runs/anatomy-smoke")], 2
        config = Config(pairs=1, queries=2, iterations=2, eval_every=2, eval_episodes=4, device="cpu")
        train(config, runs[0], resume=runs[0].exists())
        train(replace(config, method="episodic", mix=0.0), base, resume=base.exists())
    if base is None or runs is None:
        parser.error("need --base RUN --run RUN, or --smoke")
    if len({base.name, *(run.name for run in runs)}) <= len(runs):
        parser.error("need folders of different names; rename one, or compare them one by one")

    of_base, config = load_run(base, device="cpu")
    stream = build_pairs(config, build_data(config, "train"), torch.device("cpu"))
    pairs = [stream[FIRST + k] for k in range(n)]
    torch.manual_seed(config.seed)
    untrained = build_wrapper(config, build_model(config, tuple(pairs[0][0].support_x.shape[1:])))
    trained = {run.name: load_run(run, device="cpu") for run in runs}
    models = {"untrained": untrained, base.name: of_base} | {name: wrapper for name, (wrapper, _) in trained.items()}
    anatomy = {name: gradients(wrapper, pairs) for name, wrapper in models.items()}

    print(ROW("", "α", "g_i·g_j", "|ḡ|²", "|g_i|²", "L(θ; T_j)", "L(θ'; T_j)", "minus base's"))
    alphas = {name: args.alpha or [c.inner_lr] for name, (_, c) in trained.items()}
    for alpha in sorted({alpha for chosen in alphas.values() for alpha in chosen}):
        chosen = [name for name in models if alpha in alphas.get(name, [alpha])]
        around = {name: losses(models[name], alpha, pairs) for name in chosen}
        for name, (before, after) in around.items():
            of_pairs, squares, independent = anatomy[name]
            above = "" if name == base.name else mean(after - around[base.name][1])
            print(ROW(
                name, f"{alpha:g}", mean(of_pairs), f"{independent:.3f}", f"{squares.mean():.1f}",
                f"{before.mean():.3f}", f"{after.mean():.3f}", above,
            ))  # fmt: skip


if __name__ == "__main__":
    main()
