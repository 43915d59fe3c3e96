"""Train on your own folder of images, then sort new images into classes that training never saw.

    python examples/own_images.py --root DIR     # DIR/<class>/*.jpg or *.png, or DIR/<split>/<class>/…
    python examples/own_images.py [--smoke]      # without a folder: one is made here, of drawn characters

The folder's classes are split into training, validation and test by a seed, unless it has such folders already.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image

from l2g_meta import Task
from l2g_meta.data import load
from l2g_meta.evaluation.episodes import evaluate
from l2g_meta.models.batchnorm_policy import batchnorm_policy
from l2g_meta.training.config import Config
from l2g_meta.training.loop import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--root", type=Path, help="folder of images")
parser.add_argument("--image-size", type=int, default=28)
parser.add_argument("--smoke", action="store_true", help="two updates, ten episodes")
args = parser.parse_args()
iterations, episodes = (2, 10) if args.smoke else (200, 600)


def draw_some_images(root: Path) -> None:
    """40 classes of 10 PNG files each, one folder a class."""
    glyphs = load("glyphs", "train")
    for rows in glyphs.index[:40]:
        folder = root / glyphs.class_names[glyphs.labels[rows[0]]].replace("/", "-")
        folder.mkdir(parents=True)
        for row in rows[:10]:
            Image.fromarray(glyphs.images[row, :, :, 0].numpy()).save(folder / f"{row}.png")


with tempfile.TemporaryDirectory() as scratch:
    root = args.root or Path(scratch) / "images"
    if args.root is None:
        draw_some_images(root)

    config = Config(
        data="folder", root=str(root), image_size=args.image_size, ways=3, shots=1, queries=4, pairs=2,
        method="l2g", inner_lr=0.003, mix=0.5,
        iterations=iterations, eval_every=max(1, iterations // 4), eval_episodes=episodes,
    )  # fmt: skip
    model = train(config, Path(scratch) / "run")
    test = load("folder", "test", root=root, image_size=args.image_size)
    print(evaluate(model, test, ways=3, shots=5, queries=4, episodes=episodes))

    # By hand: five labelled images of each test class, and one new image of each.
    classes = test.class_names
    support = torch.cat([test.gather(rows[:5]) for rows in test.index])
    query = torch.cat([test.gather(rows[5:6]) for rows in test.index])
    y = torch.arange(len(classes))
    task = Task(support, y.repeat_interleave(5), query, y, len(classes))
    with torch.no_grad(), batchnorm_policy(model.module, "running"):
        probabilities = model.module(task.to(next(model.parameters()).device)).softmax(-1).cpu()
    for name, p in list(zip(classes, probabilities, strict=True))[:5]:
        print(f"an image of {name}: {classes[p.argmax()]} with probability {p.max():.2f}")
