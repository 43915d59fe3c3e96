"""L2G in easyfsl's episodic training: its PrototypicalNetworks, its TaskSampler and its loop.

    python examples/easyfsl_prototypical.py --specs DIR    # DIR/train.json, val.json and test.json of easyfsl's EasySet
    python examples/easyfsl_prototypical.py --smoke        # generated images, seconds

After notebooks/episodic_training.ipynb of easyfsl (MIT licence). A line that ends in ``# L2G`` is new, one after
``# before:`` is what stood there.
"""

import argparse
import random
from pathlib import Path
from statistics import mean

import torch
from easyfsl import samplers
from easyfsl.datasets import EasySet, FewShotDataset, WrapFewShotDataset
from easyfsl.methods import PrototypicalNetworks
from easyfsl.modules import resnet12
from easyfsl.utils import evaluate
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader
from torchvision.datasets import FakeData
from torchvision.transforms import ToTensor

from l2g_meta import L2GWrapper, Task  # L2G

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--specs", type=Path, default=Path("data/CUB"), help="folder of easyfsl's JSON files")
parser.add_argument("--workers", type=int, default=4)
parser.add_argument("--smoke", action="store_true", help="two epochs of two small tasks")
args = parser.parse_args()
n_way, n_shot, n_query = (3, 1, 3) if args.smoke else (5, 5, 10)
n_epochs, n_tasks_per_epoch, n_validation_tasks, n_test_tasks = (2, 2, 4, 4) if args.smoke else (200, 500, 100, 1000)
device = "cuda" if torch.cuda.is_available() else "cpu"


class AnySource:
    """Not for L2G: easyfsl 1.5 hands ``data_source=None`` to PyTorch's Sampler, which has no such argument any more."""

    def __init__(self, data_source: None):
        pass


class TaskSampler(samplers.TaskSampler, AnySource):
    """easyfsl's, under a current PyTorch."""


def few_shot_dataset(split: str) -> FewShotDataset:
    """The images of ``--specs``, or generated ones."""
    if args.smoke:
        return WrapFewShotDataset(FakeData(160, (3, 24, 24), num_classes=8, transform=ToTensor()))
    return EasySet(args.specs / f"{split}.json", training=split == "train")


def task_loader(split: str, n_way: int, n_tasks: int) -> DataLoader:
    """A loader of easyfsl's tasks (support_images, support_labels, query_images, query_labels, class_ids)."""
    dataset = few_shot_dataset(split)
    sampler = TaskSampler(dataset, n_way=n_way, n_shot=n_shot, n_query=n_query, n_tasks=n_tasks)
    workers = 0 if args.smoke else args.workers
    return DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=sampler.episodic_collate_fn)


def training_epoch(model: PrototypicalNetworks, data_loader: DataLoader, optimizer: Optimizer) -> float:
    """One epoch; the mean loss."""
    all_loss = []
    model.train()
    for support_images, support_labels, query_images, query_labels, _ in data_loader:
        optimizer.zero_grad()
        # before: model.process_support_set(support_images.to(device), support_labels.to(device))
        # before: loss = torch.nn.functional.cross_entropy(model(query_images.to(device)), query_labels.to(device))
        task = Task.of((support_images, support_labels, query_images, query_labels)).to(device)  # L2G
        loss = l2g(*task.split_classes())  # L2G
        loss.backward()
        optimizer.step()
        all_loss.append(loss.item())
    return mean(all_loss)


random.seed(0)
torch.manual_seed(0)
# before: train_loader = task_loader("train", n_way, n_tasks_per_epoch)
train_loader = task_loader("train", 2 * n_way, n_tasks_per_epoch)  # L2G
val_loader = task_loader("val", n_way, n_validation_tasks)
few_shot_classifier = PrototypicalNetworks(resnet12()).to(device)
l2g = L2GWrapper(few_shot_classifier, inner_lr=0.003, mix=0.5)  # L2G
train_optimizer = SGD(few_shot_classifier.parameters(), lr=1e-2, momentum=0.9, weight_decay=5e-4)
train_scheduler = MultiStepLR(train_optimizer, milestones=[120, 160], gamma=0.1)

best_state, best_validation_accuracy = few_shot_classifier.state_dict(), 0.0
for epoch in range(n_epochs):
    average_loss = training_epoch(few_shot_classifier, train_loader, train_optimizer)
    validation_accuracy = evaluate(few_shot_classifier, val_loader, device=device, use_tqdm=False)
    if validation_accuracy > best_validation_accuracy:
        best_validation_accuracy = validation_accuracy
        best_state = {name: value.clone() for name, value in few_shot_classifier.state_dict().items()}
    train_scheduler.step()
    print(f"epoch {epoch}: loss {average_loss:.3f}, validation accuracy {100 * validation_accuracy:.2f} %")

few_shot_classifier.load_state_dict(best_state)
test_loader = task_loader("test", n_way, n_test_tasks)
accuracy = evaluate(few_shot_classifier, test_loader, device=device, use_tqdm=False)
print(f"Average accuracy : {100 * accuracy:.2f} %")
