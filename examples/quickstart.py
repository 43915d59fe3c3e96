"""L2G beside episodic training, in minutes on a CPU: train both, test both on unseen alphabets, show it.

    python examples/quickstart.py            # the demo; run again, it continues or shows the table again
    python examples/quickstart.py --smoke    # seconds, to see that everything works

Both methods see the same pairs of tasks in the same order and take the same number of updates: episodic training learns
from both tasks of each pair, L2G from T_j after an inner step on T_i.
"""

import argparse
from pathlib import Path

from l2g_meta.build import build_data, load_run
from l2g_meta.config import Config
from l2g_meta.evaluation import evaluate, paired_difference
from l2g_meta.logs import read_log
from l2g_meta.plots import learning_curve, tsne
from l2g_meta.training import train

METHODS = {"episodic": "Episodic", "l2g": "L2G"}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", type=Path, help="folder of the runs and pictures (default: runs/quickstart)")
parser.add_argument("--smoke", action="store_true", help="two updates, ten episodes")
args = parser.parse_args()
out = args.out or Path("runs/quickstart-smoke" if args.smoke else "runs/quickstart")
size = {"iterations": 2, "eval_every": 1, "eval_episodes": 10} if args.smoke else {}
episodes = 10 if args.smoke else 600

# Train. Config() is 5-way 1-shot with a Conv4-64 Prototypical Network on glyphs, 2 pairs of tasks per update.
runs = {method: out / method for method in METHODS}
for method, run in runs.items():
    train(Config(method=method, **size), run, resume=(run / "last.safetensors").exists())

# Evaluate on characters of scripts that neither training nor validation has seen.
models = {method: load_run(run)[0] for method, run in runs.items()}
config = load_run(runs["l2g"])[1]
test = build_data(config, "test")
scores = {
    (method, ways): evaluate(model, test, ways=ways, shots=1, queries=5, episodes=episodes, device=None)
    for method, model in models.items()
    for ways in (5, 20)
}

# One table: mean accuracy in %, ± 95% confidence interval over the test episodes of this one trained model.
seconds = {method: sum(float(row["seconds"]) for row in read_log(run)) for method, run in runs.items()}
updates = len(read_log(runs["l2g"]))
print(f"\n1-shot accuracy on unseen scripts (%), ± 95% over {episodes} episodes; {updates} updates each, one seed\n")
print(f"{'':12} {'5-way':>16} {'20-way':>16} {'training':>12}")
for method, title in METHODS.items():
    cells = (f"{scores[method, ways].accuracy_mean:.2f} ± {scores[method, ways].ci95_episodes:.2f}" for ways in (5, 20))
    print(f"{title:12} {next(cells):>16} {next(cells):>16} {seconds[method]:>10.0f} s")
differences = (paired_difference(scores["l2g", ways], scores["episodic", ways]) for ways in (5, 20))
cells = (f"{mean:+.2f} ± {half:.2f}" for mean, half in differences)
print(f"{'difference':12} {next(cells):>16} {next(cells):>16}")
print("chance              20.00             5.00".replace("20.00 ", "20.00"))

# Pictures.
curve = learning_curve(list(runs.values()), out / "convergence.png", labels=list(METHODS.values()))
picture = tsne(
    {METHODS[method]: model for method, model in models.items()}, test, out / "tsne.png", ways=8, shots=5, queries=20
)
print(f"\npictures: {curve}, {picture}")
