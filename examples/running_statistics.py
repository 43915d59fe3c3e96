"""Which pass should feed BatchNorm's running statistics: the one under θ, or the one under θ'?

    python examples/running_statistics.py --run RUN [--pairs 200]
    python examples/running_statistics.py --smoke

Training feeds them by the passes under θ, which is what classifies. This estimates them anew for a trained run, once by
passes under θ and once by passes under θ', and tests both, beside those of training and the episode's own.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from l2g_meta import L2GWrapper
from l2g_meta.evaluation.episodes import evaluate, paired_difference
from l2g_meta.training.build import build_data, build_pairs, load_run
from l2g_meta.training.config import Config
from l2g_meta.training.loop import train

Statistics = dict[str, torch.Tensor]


def statistics(model: nn.Module) -> Statistics:
    """The running statistics of a model, which after a pass with momentum 1 are those of its batch."""
    return {name: b.clone() for name, b in model.named_buffers() if "running" in name}


def estimated(wrapper: L2GWrapper, config: Config, n: int) -> tuple[Statistics, Statistics]:
    """Means over n pairs of tasks of the batch statistics under θ and under θ'."""
    pairs = build_pairs(config, build_data(config, "train"), torch.device("cpu"))
    norms = [m for m in wrapper.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    wrapper.train()
    found: tuple[list[Statistics], list[Statistics]] = [], []
    for k in range(n):
        task_i, task_j = pairs[10**6 + k]  # not those of training
        learner = wrapper.adapted(task_i)
        found[0].append(statistics(wrapper.module))
        with torch.no_grad():
            learner.loss(task_j)
        found[1].append(statistics(learner.module))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    wrapper.eval()
    theta, adapted = ({name: torch.stack([f[name] for f in of]).mean(0) for name in of[0]} for of in found)
    return theta, adapted


def main() -> None:
    """Prints a row for each way to get the statistics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder made by `l2g train --method l2g`")
    parser.add_argument("--pairs", type=int, default=200, help="to estimate from (default: 200)")
    parser.add_argument("--smoke", action="store_true", help="a run of two updates, to see that everything works")
    args = parser.parse_args()
    run, n = args.run, args.pairs
    if args.smoke:
        run, n = Path("runs/statistics-smoke"), 2
        config = Config(pairs=1, queries=2, iterations=2, eval_every=2, eval_episodes=4, device="cpu")
        train(config, run, resume=run.exists())
    if run is None:
        parser.error("need --run RUN, or --smoke")

    wrapper, config = load_run(run, device="cpu")
    ways = {"training": statistics(wrapper.module)}
    ways["θ"], ways["θ'"] = estimated(wrapper, config, n)
    data, episodes = build_data(config, "test"), 10 if args.smoke else 600
    shape = {"ways": config.outer_ways, "shots": config.outer_shots, "queries": config.queries, "episodes": episodes}
    results = {}
    for name, values in ways.items():
        wrapper.module.load_state_dict(values, strict=False)
        results[name] = evaluate(wrapper, data, **shape)
    results["the episode's own"] = evaluate(wrapper, data, bn="batch", **shape)
    for name, result in results.items():
        difference, half = paired_difference(result, results["θ"])
        print(f"statistics from {name}: {result.accuracy_mean:.2f} %, minus θ {difference:+.2f} ± {half:.2f}")


if __name__ == "__main__":
    main()
