"""How far answers about photos of new classes can be trusted, measured on a folder of classes.

    python examples/measure_photos.py [--smoke]                 # trains on drawn characters, classifies unseen ones
    python examples/measure_photos.py --root DIR                # DIR/<class>/*.jpg, by the model in the package
    python examples/measure_photos.py --model RUN --root DIR    # by a run or exported folder

Prints accuracy over several draws of classes and examples, with a 95% interval over draws. First steps are in
examples/classify_photos.py.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from l2g_meta import FewShotClassifier
from l2g_meta.classify.exported import export
from l2g_meta.data import load
from l2g_meta.data.images import class_files
from l2g_meta.models.functional import confidence_interval
from l2g_meta.training.config import Config
from l2g_meta.training.loop import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, help="made by `l2g train` or `l2g export`")
parser.add_argument("--root", type=Path, help="folder of one folder of images per class")
parser.add_argument("--shots", type=int, nargs="+", default=[1, 5], help="examples of each class (default: 1 5)")
parser.add_argument("--queries", type=int, help="images of each class to classify (default: 50, drawn characters 10)")
parser.add_argument("--draws", type=int, help="of classes and examples (default: 20)")
parser.add_argument("--smoke", action="store_true", help="two updates, two draws")
args = parser.parse_args()
WAYS = 5
queries, draws = args.queries or (50 if args.root else 10), args.draws or (2 if args.smoke else 20)


def train_and_export(scratch: Path) -> Path:
    """A model of drawn characters, as a folder that can be copied to another machine."""
    size = {"iterations": 2, "pairs": 1, "eval_every": 2, "eval_episodes": 2} if args.smoke else {}
    train(Config(method="l2g", inner_lr=0.003, mix=0.5, shots=(1, 5), **size), scratch / "run", progress=False)
    export(scratch / "run", scratch / "model", episodes=5 if args.smoke else 600)
    return scratch / "model"


def draw_photos(root: Path) -> Path:
    """PNG files of 12 unseen characters, a folder for each."""
    glyphs = load("glyphs", "test")
    for rows in glyphs.index[:12]:
        folder = root / glyphs.class_names[glyphs.labels[rows[0]]].replace("/", "-")
        folder.mkdir(parents=True)
        for row in rows:
            Image.fromarray(glyphs.images[row, :, :, 0].numpy()).save(folder / f"{row}.png")
    return root


def one_draw(model: Path | None, files: dict[str, list[str]], shots: int, rng: np.random.Generator) -> dict[str, float]:
    """Five classes with ``shots`` examples each."""
    known = rng.permutation(sorted(files))[:WAYS]
    photos = {name: rng.permutation(files[name])[: shots + queries].tolist() for name in known}

    classifier = FewShotClassifier(model)
    classifier.fit(sum((photos[name][:shots] for name in known), []), np.repeat(known, shots))
    begin = time.perf_counter()
    said = classifier.classify(sum((photos[name][shots:] for name in known), []))
    seconds = time.perf_counter() - begin
    return {
        "accuracy (%)": 100 * np.mean(said.labels == np.repeat(known, queries)),
        "ms per image": 1000 * seconds / len(said.labels),
    }


with tempfile.TemporaryDirectory() as scratch:
    model = args.model or (None if args.root else train_and_export(Path(scratch)))
    files = class_files(args.root or draw_photos(Path(scratch) / "photos"))

    for shots in args.shots:
        rng = np.random.default_rng(0)
        results = [one_draw(model, files, shots, rng) for _ in range(draws)]
        print(f"\n{WAYS} classes, {shots} example(s) each, {queries} images of each to classify, {draws} draws")
        for quantity in results[0]:
            values = [result[quantity] for result in results]
            print(f"  {quantity:28} {np.mean(values):6.2f} ± {confidence_interval(values):.2f}")
