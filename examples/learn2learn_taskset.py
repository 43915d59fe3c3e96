"""Train L2G on learn2learn's data: its MiniImagenet or TieredImagenet, or any Taskset.

    python examples/learn2learn_taskset.py [--smoke]                           # a Taskset made here, from glyphs
    python examples/learn2learn_taskset.py --data mini-imagenet --root DIR     # DIR/mini-imagenet-cache-*.pkl
    python examples/learn2learn_taskset.py --data tiered-imagenet --root DIR   # DIR/tiered-imagenet/*.pkl

Needs learn2learn. Its own loaders unpickle those files: use files that you trust (``l2g train`` reads the same files
safely). They hold a whole split as floats: mini-ImageNet's training split takes 3.2 GB.
"""

import argparse
import tempfile
import time
from pathlib import Path

import learn2learn as l2l
import torch
from torch.utils.data import Dataset
from torchvision import transforms as T

from l2g_meta.data import load
from l2g_meta.training.config import Config
from l2g_meta.training.log import read_log
from l2g_meta.training.loop import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", choices=("glyphs", "mini-imagenet", "tiered-imagenet"), default="glyphs")
parser.add_argument("--root", help="folder that learn2learn's data set reads")
parser.add_argument("--image-size", type=int, default=28)
parser.add_argument("--iterations", type=int, default=50)
parser.add_argument("--smoke", action="store_true", help="two updates, ten episodes")
args = parser.parse_args()
iterations, episodes = (2, 10) if args.smoke else (args.iterations, 100)


class Glyphs(Dataset):
    """A data set as learn2learn wants it: items (image, label)."""

    def __init__(self, split: str):
        self.data = load("glyphs", split)

    def __getitem__(self, i: int):
        return self.data.gather([i])[0], int(self.data.labels[i])

    def __len__(self) -> int:
        return len(self.data)


def glyphs_taskset(split: str):
    """A ready Taskset: TaskPairs reads the classes of each task and redraws T_j until it shares none with T_i."""
    dataset = l2l.data.MetaDataset(Glyphs(split))
    t = l2l.data.transforms
    return l2l.data.Taskset(
        dataset,
        [t.FusedNWaysKShots(dataset, n=5, k=1 + 5), t.LoadData(dataset), t.RemapLabels(dataset)],
    )


def imagenet(split: str):
    """A MetaDataset: TaskPairs splits its classes itself."""
    resize = T.Resize(args.image_size, antialias=True)
    normalise = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    if args.data == "mini-imagenet":  # float tensors, 0 … 255
        transform = T.Compose([T.Lambda(lambda x: x / 255), resize, normalise])
        dataset = l2l.vision.datasets.MiniImagenet(args.root, mode=split, transform=transform)
        labels = dataset.y.astype(int)
    else:  # PIL images
        transform = T.Compose([T.ToTensor(), resize, normalise])
        dataset = l2l.vision.datasets.TieredImagenet(args.root, mode=split, transform=transform)
        labels = dataset.labels
    del dataset._bookkeeping_path  # learn2learn would write a pickle into the data folder, and trust one found there
    # Labels from the label list: left to itself, MetaDataset decodes every image to learn its class.
    return l2l.data.MetaDataset(dataset, indices_to_labels={i: int(y) for i, y in enumerate(labels)})


if args.data != "glyphs" and args.root is None:
    parser.error("--data mini-imagenet and tiered-imagenet need --root DIR")
make = glyphs_taskset if args.data == "glyphs" else imagenet
began = time.perf_counter()
data, validation = make("train"), make("validation")
print(f"{type(data).__name__} of {args.data} loaded in {time.perf_counter() - began:.1f} s")

config = Config(
    method="l2g", inner_lr=0.003, mix=0.5, queries=5, pairs=2,
    iterations=iterations, eval_every=iterations, eval_episodes=episodes,
)  # fmt: skip
torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    run = Path(folder) / "run"
    train(config, run, data=data, validation=validation)
    rows = read_log(run)
first, last = rows[:10], rows[-10:]
print(
    f"{len(rows)} updates: loss {sum(float(r['loss']) for r in first) / len(first):.3f} -> "
    f"{sum(float(r['loss']) for r in last) / len(last):.3f} (means of 10), "
    f"validation {float(rows[-1]['val_accuracy']):.1f} ± {float(rows[-1]['val_ci95']):.1f} % (5-way 1-shot, "
    f"{episodes} episodes)"
)
