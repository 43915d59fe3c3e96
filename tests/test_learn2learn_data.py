import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from l2g_meta.data import TaskPairs
from l2g_meta.data.learn2learn import MAX_REDRAWS, isolated_random
from l2g_meta.errors import DataError
from l2g_meta.inner.clone import has_learn2learn, require_learn2learn

pytestmark = pytest.mark.skipif(not has_learn2learn(), reason="learn2learn is not installed")
SHAPE = dict(ways=3, shots=1, queries=2)


class Numbers(Dataset):
    """Input = (row, noise from the global generator); classes are words, 10 rows each."""

    words = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen"]

    def __init__(self, n_classes=8):
        self.n_classes = n_classes

    def __getitem__(self, i):
        return torch.tensor([float(i), random.random(), np.random.rand(), torch.rand(()).item()]), self.words[i // 10]

    def __len__(self):
        return 10 * self.n_classes


def meta_dataset(n_classes=8):
    return require_learn2learn().data.MetaDataset(Numbers(n_classes))


def taskset(ways=3, examples=3, num_tasks=-1, n_classes=8, remap=True):
    l2l = require_learn2learn()
    meta = meta_dataset(n_classes)
    t = l2l.data.transforms
    transforms = [t.NWays(meta, n=ways), t.KShots(meta, k=examples), t.LoadData(meta)]
    if remap:
        transforms += [t.RemapLabels(meta), t.ConsecutiveLabels(meta)]
    return l2l.data.Taskset(meta, transforms, num_tasks=num_tasks)


def classes_of(task):
    return set((torch.cat([task.support_x, task.query_x])[:, 0] // 10).long().tolist())


@pytest.mark.parametrize(
    "source", [meta_dataset, taskset, lambda: taskset(num_tasks=30)], ids=["meta", "set", "finite"]
)
def test_pairs_are_disjoint_deterministic_and_leave_the_generators_alone(source):
    pairs = TaskPairs(source(), **SHAPE, seed=5)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    states = random.getstate(), torch.get_rng_state()
    first = {k: pairs[k] for k in (4, 1, 3)}
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    again = TaskPairs(source(), **SHAPE, seed=5)
    for k in (1, 3, 4):
        for a, b in zip(first[k], again[k], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
        task_i, task_j = first[k]
        assert classes_of(task_i).isdisjoint(classes_of(task_j))
        for task in (task_i.check(), task_j.check()):
            rows, labels = torch.cat([task.support_x, task.query_x])[:, 0], torch.cat([task.support_y, task.query_y])
            assert len(rows.unique()) == 9
            assert all(len((rows[labels == c] // 10).unique()) == 1 for c in range(3))
    assert not torch.equal(first[1][0].support_x, first[3][0].support_x)


def test_shapes_of_the_two_tasks_are_free_with_a_meta_dataset():
    task_i, task_j = TaskPairs(meta_dataset(), **SHAPE, outer_ways=5, outer_shots=2, outer_queries=4)[0]
    assert (task_i.n_way, task_j.n_way) == (3, 5) and len(task_j.support_y) == 10 and len(task_j.query_y) == 20


def test_a_set_that_cannot_give_disjoint_tasks_says_what_to_pass():
    with pytest.raises(DataError, match=f"none in {MAX_REDRAWS} draws .* pass the MetaDataset"):
        TaskPairs(taskset(n_classes=5), **SHAPE)[0]


def test_shots_and_ways_must_be_what_the_set_gives():
    with pytest.raises(DataError, match=r"need tasks of 3 classes × 4 examples .* gives 3 × 3"):
        TaskPairs(taskset(), ways=3, shots=1, queries=3)[0]
    with pytest.raises(DataError, match="a disjoint pair needs 10 classes, the split has 8"):
        TaskPairs(meta_dataset(), ways=5, shots=1, queries=1)


def test_images_without_a_transform_are_explained():
    class Pictures(Numbers):
        def __getitem__(self, i):
            return object(), self.words[i // 10]

    pairs = TaskPairs(require_learn2learn().data.MetaDataset(Pictures()), **SHAPE)
    with pytest.raises(DataError, match="transform=torchvision.transforms.ToTensor"):
        pairs[0]


def test_isolated_random_restores_after_an_error():
    state = random.getstate()
    with pytest.raises(ZeroDivisionError), isolated_random(3):
        random.random()
        raise ZeroDivisionError
    assert random.getstate() == state
