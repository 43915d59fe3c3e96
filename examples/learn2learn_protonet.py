"""L2G in learn2learn's ProtoNet: its network, its MiniImagenet, its task sets and its loop.

    python examples/learn2learn_protonet.py --root DIR    # DIR/mini-imagenet-cache-*.pkl, downloaded if missing
    python examples/learn2learn_protonet.py --smoke       # generated images, seconds

After examples/vision/protonet_miniimagenet.py of learn2learn (MIT licence). A line that ends in ``# L2G`` is new, one
after ``# before:`` is what stood there. learn2learn unpickles its files: use files that you trust.
"""

import argparse
import pickle
import random
import tempfile
from pathlib import Path

import learn2learn as l2l
import numpy as np
import torch
from learn2learn.data.transforms import KShots, LoadData, NWays, RemapLabels
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from l2g_meta import L2GWrapper, MetricModel, PrototypicalHead, Task  # L2G

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--root", default="data", help="folder of learn2learn's MiniImagenet")
parser.add_argument("--max-epoch", type=int, default=250)
parser.add_argument("--shot", type=int, default=1)
parser.add_argument("--train-way", type=int, default=30)
parser.add_argument("--train-query", type=int, default=15)
parser.add_argument("--test-way", type=int, default=5)
parser.add_argument("--test-query", type=int, default=30)
parser.add_argument("--smoke", action="store_true", help="two epochs of two small tasks")
args = parser.parse_args()
batches, tests = 100, 2000
if args.smoke:
    args.max_epoch, args.train_way, args.train_query, args.test_query, batches, tests = 2, 3, 4, 4, 2, 5


class Convnet(nn.Module):
    """learn2learn's four blocks, and its way to flatten their maps."""

    def __init__(self, x_dim: int = 3, hid_dim: int = 64):
        super().__init__()
        self.encoder = l2l.vision.models.ConvBase(hidden=hid_dim, channels=x_dim, max_pool=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Embeddings of images."""
        x = self.encoder(x)
        return x.view(x.size(0), -1)


def fast_adapt(model: nn.Module, batch: list, ways: int, shot: int, queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and accuracy of one task, whose prototypes are the means of its supports."""
    data, labels = (t.squeeze(0).to(device) for t in batch)
    order = torch.argsort(labels, stable=True)
    embeddings, labels = model(data[order]), labels[order]
    is_support = torch.arange(ways * (shot + queries), device=device) % (shot + queries) < shot
    prototypes = embeddings[is_support].reshape(ways, shot, -1).mean(dim=1)
    logits = -((embeddings[~is_support][:, None] - prototypes) ** 2).sum(dim=2)
    labels = labels[~is_support]
    return F.cross_entropy(logits, labels), (logits.argmax(dim=1) == labels).float().mean()


def tasks(mode: str, ways: int, k: int, num_tasks: int = -1) -> DataLoader:
    """A loader of learn2learn's tasks, each a batch (images, labels) of k examples of every class."""
    dataset = l2l.data.MetaDataset(l2l.vision.datasets.MiniImagenet(root=args.root, mode=mode, download=True))
    transforms = [NWays(dataset, ways), KShots(dataset, k), LoadData(dataset), RemapLabels(dataset)]
    return DataLoader(l2l.data.Taskset(dataset, task_transforms=transforms, num_tasks=num_tasks), shuffle=True)


def write_small_imagenet(root: Path) -> None:
    """Three files in the layout of mini-ImageNet: noise around a colour of each class, 32 pixels wide."""
    rng = np.random.default_rng(0)
    for mode in ("train", "validation", "test"):
        colours = rng.integers(100, 150, (8, 1, 1, 1, 3))
        images = (colours + rng.normal(0, 80, (8, 10, 32, 32, 3))).clip(0, 255).astype(np.uint8).reshape(-1, 32, 32, 3)
        classes = {f"{mode}-{c}": list(range(10 * c, 10 * c + 10)) for c in range(8)}
        with open(root / f"mini-imagenet-cache-{mode}.pkl", "wb") as file:
            pickle.dump({"image_data": images, "class_dict": classes}, file)


folder = tempfile.TemporaryDirectory()
if args.smoke:
    args.root = folder.name
    write_small_imagenet(Path(folder.name))
random.seed(0)  # learn2learn draws tasks from it
torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

model = Convnet().to(device)
l2g = L2GWrapper(MetricModel(model, PrototypicalHead()), inner_lr=0.003, mix=0.5)  # L2G
# before: train_loader = tasks("train", args.train_way, args.shot + args.train_query)
train_loader = tasks("train", 2 * args.train_way, args.shot + args.train_query)  # L2G
valid_loader = tasks("validation", args.test_way, args.shot + args.test_query, num_tasks=min(200, tests))
test_loader = tasks("test", args.test_way, args.shot + args.test_query, num_tasks=tests)
optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=20, gamma=0.5)

for epoch in range(1, args.max_epoch + 1):
    model.train()
    n_loss = 0.0
    for _ in range(batches):
        batch = next(iter(train_loader))
        # before: loss, _ = fast_adapt(model, batch, args.train_way, args.shot, args.train_query)
        loss = l2g(*Task.from_batch(*batch, shots=args.shot).to(device).split_classes())  # L2G
        n_loss += loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    lr_scheduler.step()

    model.eval()
    with torch.no_grad():
        accuracies = [fast_adapt(model, b, args.test_way, args.shot, args.test_query)[1] for b in valid_loader]
    print(f"epoch {epoch}: loss {n_loss / batches:.4f}, validation accuracy {torch.stack(accuracies).mean():.4f}")

with torch.no_grad():
    accuracies = [fast_adapt(model, b, args.test_way, args.shot, args.test_query)[1] for b in test_loader]
print(f"test accuracy {torch.stack(accuracies).mean():.4f}")
folder.cleanup()
