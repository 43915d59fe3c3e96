"""L2G in PyTorch Lightning: several epochs, workers that load tasks, checkpoints and resuming.

    python examples/lightning_training.py --root DIR             # DIR/train and DIR/val, folders of images per class
    python examples/lightning_training.py --root DIR --resume    # goes on from the last checkpoint, to --epochs
    python examples/lightning_training.py --smoke                # generated images, seconds

After examples/pytorch/basics/backbone_image_classifier.py of PyTorch Lightning (Apache licence 2.0). A line that ends
in ``# L2G`` is new, one after ``# before:`` is what stood there.
"""

import argparse
import tempfile
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, Grayscale, Resize, ToTensor

from l2g_meta import L2GWrapper, MetricModel, PrototypicalHead, TaskPairs  # L2G

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--root", type=Path, help="folder of train/CLASS/IMAGE and val/CLASS/IMAGE")
parser.add_argument("--out", type=Path, default=Path("lightning"), help="folder of the checkpoints")
parser.add_argument("--epochs", type=int, default=50)
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
parser.add_argument("--smoke", action="store_true", help="generated images, epochs of three small tasks")
args = parser.parse_args()
ways, queries, length = (3, 2, 3) if args.smoke else (5, 15, 200)


class Backbone(nn.Module):
    """Lightning's example network."""

    def __init__(self, hidden_dim: int = 128):
        super().__init__()
        self.l1 = nn.Linear(28 * 28, hidden_dim)
        self.l2 = nn.Linear(hidden_dim, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Ten numbers for each image."""
        x = x.view(x.size(0), -1)
        x = torch.relu(self.l1(x))
        return torch.relu(self.l2(x))


class LitClassifier(L.LightningModule):
    """Lightning's example module."""

    def __init__(self, backbone: nn.Module, learning_rate: float = 0.001):
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        # before: self.backbone = backbone
        self.l2g = L2GWrapper(MetricModel(backbone, PrototypicalHead()), inner_lr=0.003, mix=0.5)  # L2G

    def training_step(self, batch: tuple, batch_idx: int) -> torch.Tensor:
        """Loss of one batch, that is of one pair of tasks."""
        # before: x, y = batch
        # before: loss = nn.functional.cross_entropy(self.backbone(x), y)
        loss = self.l2g(*batch)  # L2G
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=1)
        return loss

    def validation_step(self, batch: tuple, batch_idx: int) -> None:
        """Loss of the model as it is, without an inner step, on classes that training has not seen."""
        # before: x, y = batch
        # before: loss = nn.functional.cross_entropy(self.backbone(x), y)
        loss = self.l2g.loss(batch[1])  # L2G
        self.log("valid_loss", loss, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)


def loader(split: str) -> DataLoader:
    """Batches of a split of ``--root``."""
    images = ImageFolder(args.root / split, Compose([Grayscale(), Resize((28, 28)), ToTensor()]))
    # before: return DataLoader(images, batch_size=32, shuffle=split == "train", num_workers=args.workers)
    return TaskPairs(images, ways=ways, shots=1, queries=queries, length=length).loader(args.workers)  # L2G


def draw_images(root: Path) -> None:
    """Six classes of each split: noise around a random pattern of each class."""
    rng = np.random.default_rng(0)
    for name in (f"{split}/class-{c}" for split in ("train", "val") for c in range(6)):
        (root / name).mkdir(parents=True)
        pattern = rng.uniform(0, 255, (28, 28))
        for i in range(6):
            noisy = (pattern + rng.normal(0, 60, (28, 28))).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / name / f"{i}.png")


def main() -> None:
    """Trains for ``--epochs``, or goes on until there."""
    L.seed_everything(0)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        default_root_dir=args.out,
        callbacks=[ModelCheckpoint(args.out, save_last=True)],
        accelerator="cpu" if args.smoke else "auto",
        logger=not args.smoke,
        log_every_n_steps=1,
        enable_progress_bar=False,
    )
    last = args.out / "last.ckpt" if args.resume else None
    trainer.fit(LitClassifier(Backbone()), loader("train"), loader("val"), ckpt_path=last)
    losses = {name: round(float(value), 4) for name, value in trainer.callback_metrics.items()}
    print(f"epoch {trainer.current_epoch}, update {trainer.global_step}: {losses}")


if args.smoke:
    args.epochs = min(args.epochs, 3)
with tempfile.TemporaryDirectory() as folder:
    if args.smoke:
        args.root = Path(folder)
        draw_images(args.root)
    main()
