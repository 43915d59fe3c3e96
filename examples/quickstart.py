"""L2G beside episodic training, in minutes on a CPU: train both, test both on unseen alphabets, show it.

    python examples/quickstart.py            # the demo; run again, it continues or shows the table again
    python examples/quickstart.py --smoke    # seconds, to see that everything works

All take the same number of updates on one stream of pairs of tasks. L2G learns to classify T_j after an inner step on
T_i alone (Algorithm 1; the paper has α = 0.01), and with mix 0.5, the weight of T_i's own loss. Episodic training gets
2 tasks per update, the number of L2G's outer tasks, or 4, the number of all its tasks.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from l2g_meta.evaluation.episodes import evaluate, paired_difference
from l2g_meta.training.allocator import keep_freed_memory
from l2g_meta.training.build import build_data, load_run
from l2g_meta.training.config import Config
from l2g_meta.training.curves import learning_curve
from l2g_meta.training.log import read_log
from l2g_meta.training.loop import train

# Config() is 5-way 1-shot with a Conv4-64 Prototypical Network on glyphs, 2 pairs of tasks per update.
METHODS = {
    "Episodic, 2 tasks": Config(method="episodic", tasks_per_update=2),
    "Episodic, 4 tasks": Config(method="episodic"),
    "L2G, Algorithm 1": Config(method="l2g", inner_lr=0.003, mix=0.0),
    "L2G, mix 0.5": Config(method="l2g", inner_lr=0.003, mix=0.5),
}
L2G = "L2G, mix 0.5"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, help="folder of the runs and the picture (default: runs/quickstart)")
parser.add_argument("--smoke", action="store_true", help="two updates, ten episodes")
args = parser.parse_args()
out = args.out or Path("runs/quickstart-smoke" if args.smoke else "runs/quickstart")
size = {"iterations": 2, "eval_every": 1, "eval_episodes": 10} if args.smoke else {}
episodes = 10 if args.smoke else 600

# Train.
keep_freed_memory()
runs = {title: out / title.lower().replace(", ", "-").replace(" ", "-") for title in METHODS}
for title, run in runs.items():
    train(replace(METHODS[title], **size), run, resume=(run / "config.json").exists())

# Evaluate on characters of scripts that neither training nor validation has seen.
models = {title: load_run(run)[0] for title, run in runs.items()}
test = build_data(Config().resolved(), "test")
scores = {
    (title, ways): evaluate(
        model, test, ways=ways, shots=1, queries=5, episodes=episodes, device=next(model.parameters()).device
    )
    for title, model in models.items()
    for ways in (5, 20)
}

# One table: mean accuracy in %, ± 95% confidence interval over the test episodes of this one trained model.
logs = {title: read_log(run) for title, run in runs.items()}
print(f"\n1-shot accuracy on unseen scripts (%), ± 95% over {episodes} episodes; {len(logs[L2G])} updates, one seed\n")
line = "{:24} {:>15} {:>15} {:>12}".format
print(line("", "5-way", "20-way", "training"))
for title, log in logs.items():
    cells = [f"{scores[title, ways].accuracy_mean:.2f} ± {scores[title, ways].ci95_episodes:.2f}" for ways in (5, 20)]
    print(line(title, *cells, f"{sum(float(row['seconds']) for row in log):.0f} s"))
print(line("chance", "20.00       ", "5.00       ", ""))
for title in (other for other in METHODS if other != L2G):
    gains = [paired_difference(scores[L2G, ways], scores[title, ways]) for ways in (5, 20)]
    print(line(f"mix − {title}", *(f"{mean:+.2f} ± {half:.2f}" for mean, half in gains), ""))

picture = learning_curve(list(runs.values()), out / "convergence.png", labels=list(runs))
print(f"\npicture: {picture}")
