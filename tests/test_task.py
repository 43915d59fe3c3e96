import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from l2g_meta import MetricModel, PrototypicalHead, Task
from l2g_meta.errors import DataError
from l2g_meta.models.maml import SoftmaxMAML
from l2g_meta.models.meta_lstm import MetaLSTM

X, Y = torch.ones(4, 2), torch.tensor([0, 1, 0, 1])


def test_from_batch_takes_the_first_shots_of_each_class_whatever_the_order():
    y = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1, 1])
    x = torch.arange(10.0)[:, None]
    task = Task.from_batch(x, y, shots=2, n_way=3)
    for c in range(3):
        mine = x[y == c].flatten()
        assert torch.equal(task.support_x[task.support_y == c].flatten(), mine[:2])
        assert torch.equal(task.query_x[task.query_y == c].flatten(), mine[2:])
    assert task.n_way == 3 and task.check() is task


@pytest.mark.parametrize(
    ("y", "options", "message"),
    [
        ([0, 0, 5, 5], {"n_way": 3}, r"need 3 different labels for n_way=3, got \[0, 5\]; .*leave n_way out"),
        ([0, 0, 1], {}, r"at least 2 examples of each class .* got \[2, 1\] per class; lower shots"),
        ([0, 0, 1, 1], {"shots": 2}, "at least 3 examples of each class for shots=2, split='first'"),
        ([0, 0, 1, 1, 0, 1], {"shots": 2, "split": "even-odd"}, "at least 4 examples .* split='even-odd'"),
        ([0, 0, 1, 1], {"shots": 0}, "need shots to be an integer of at least 1, got 0"),
        ([0, 0, 1, 1], {"shots": "1"}, "need shots to be an integer of at least 1, got '1'"),
        ([0, 0, 1, 1], {"split": "odd"}, "split to be 'first' or 'even-odd', got 'odd'"),
        ([0, 0], {}, "one label per input"),
        ([[0, 0, 1, 1]] * 2, {}, r"need one task, got a batch of 2; DataLoader\(..., batch_size=None\)"),
        ([], {}, r"got \[\] per class"),
        (["a", "b", "a", "b"], {}, "need tensors or arrays of input inputs .*, got Tensor and list"),
    ],
)
def test_from_batch_errors(y, options, message):
    shape = (2, 4, 1) if np.ndim(y) == 2 else (4 if len(y) == 2 else len(y), 1)
    with pytest.raises(DataError, match=message):
        Task.from_batch(torch.randn(shape), y, **{"shots": 1, **options})


def test_from_batch_takes_what_loaders_give():
    """A leading 1, labels of any numbers and types, n_way read off them."""
    x, y = torch.arange(8.0)[:, None], torch.tensor([7, -2, 7, 30, -2, 30, 7, 7])
    expected = Task.from_batch(x, torch.tensor([1, 0, 1, 2, 0, 2, 1, 1]), shots=1, n_way=3)
    for task in (
        Task.from_batch(x, y, shots=1),
        Task.from_batch(x[None], y[None], shots=1),
        Task.from_batch(x, y.tolist(), shots=1, n_way=3),
        Task.from_batch(x, y.numpy().astype(np.int16), shots=1),
        Task.from_batch(x, y.double(), shots=1),
    ):
        assert task.n_way == 3 and type(task.n_way) is int and task.check() is task
        assert all(torch.equal(a, b) for a, b in zip(task[:4], expected[:4], strict=True))


def test_even_odd_split_is_learn2learns():
    """Of a batch sorted by class with 2 · shots examples each: supports at even positions, queries at odd ones."""
    ways, shots = 3, 2
    y = torch.tensor([20, 10, 30]).repeat_interleave(2 * shots)[torch.randperm(ways * 2 * shots)]
    x = torch.arange(float(len(y)))[:, None]
    task = Task.from_batch(x, y, shots=shots, split="even-odd")
    order = y.argsort(stable=True)
    mask = np.zeros(len(y), dtype=bool)
    mask[np.arange(shots * ways) * 2] = True  # as examples/vision/maml_miniimagenet.py has it
    assert torch.equal(task.support_x, x[order][mask]) and torch.equal(task.query_x, x[order][~mask])
    assert task.support_y.tolist() == task.query_y.tolist() == [0, 0, 1, 1, 2, 2]
    longer = Task.from_batch(torch.arange(5.0)[:, None], torch.zeros(5), shots=2, split="even-odd")
    assert longer.support_x.flatten().tolist() == [0, 2] and longer.query_x.flatten().tolist() == [1, 3, 4]


def same(a, b):
    return a.n_way == b.n_way and all(torch.equal(s, t) for s, t in zip(a[:4], b[:4], strict=True))


def test_of_takes_tasks_and_tuples():
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    task = Task(x, y, x, y, 2)
    assert Task.of(task) is task
    plain = tuple(task[:4])
    for value in (plain, list(plain), (*plain, 2), (*plain, np.int64(2)), (*plain, ["cat", "dog"]), (*plain, [3, 5])):
        assert same(Task.of(value), task) and type(Task.of(value).n_way) is int
    assert same(Task.of((x, y + 3, x, y + 3)), task)  # numbered
    assert Task.of((*plain, 3)).n_way == 3
    with pytest.raises(DataError, match=r"none of \[2\]"):
        Task.of((*plain, 3)).check()


def test_of_takes_what_a_dataloader_makes_of_a_task():
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    task = Task(x, y, x, y, 2)
    (collated,) = DataLoader([task])
    assert isinstance(collated, Task) and isinstance(collated.n_way, torch.Tensor)
    assert same(Task.of(collated), task)
    (plain,) = DataLoader([tuple(task[:4])])
    assert same(Task.of(plain), task)
    (two,) = DataLoader([task, task], batch_size=2)
    with pytest.raises(DataError, match="need one task, got a batch of 2; .*batch_size=None"):
        Task.of(two)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.randn(4, 2), r"need a Task or a tuple \(support_x, .*got a Tensor; Task.from_batch"),
        (None, "got a NoneType"),
        ((1, 2), "got a tuple of 2"),
        ({"support": 1}, "got a dict"),
        ((X, Y, X, Y[:3]), r"one label per query, x \(n, ...\) and y \(n,\), got x \(4, 2\) and y \(3,\)"),
        ((X, X + 0.5, Y, Y), "need integer labels, got torch.float32"),
        ((X, Y, list(X), Y), "arrays of query inputs .*, got list and Tensor: .*; torch.stack joins a list of tensors"),
        ((X, object(), X, Y), "support inputs .* and of their labels .*, got Tensor and object"),
        ((X, Y, X, Y + 1), r"queries of the classes that have a support, \[0, 1\], got a query of class 2"),
        ((X, Y[:, None, None], X, Y), "one label per support"),
    ],
)
def test_of_refuses_the_rest(value, message):
    with pytest.raises(DataError, match=message):
        Task.of(value)


def test_models_take_tuples():
    x, y = torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 0, 1])
    task, flat = Task(x, y, x, y, 2), nn.Flatten()
    for model in (
        MetricModel(flat, PrototypicalHead()),
        SoftmaxMAML(nn.Sequential(flat, nn.Linear(16, 2)), 2),
        MetaLSTM(nn.Sequential(flat, nn.Linear(16, 2)), 2),
    ):
        assert torch.equal(model((x, y, x, y)), model(task))


def test_split_classes_makes_a_disjoint_pair():
    x = torch.arange(12.0)[:, None]
    y = torch.tensor([3, 1, 0, 2, 2, 0, 1, 3, 3, 3, 0, 1])
    task = Task(x, y, x + 100, y.flip(0), 4)
    pair = task.split_classes()
    for part, classes in zip(pair, ([0, 1], [2, 3]), strict=True):
        assert part.check() is part and part.n_way == 2
        for c, original in enumerate(classes):
            assert torch.equal(part.support_x[part.support_y == c], task.support_x[task.support_y == original])
            assert torch.equal(part.query_x[part.query_y == c], task.query_x[task.query_y == original])
    assert sum(len(part.query_y) for part in pair) == 12
    with pytest.raises(DataError, match="need an even number of classes .*, got 5; draw an episode of 4 or 6 ways"):
        task._replace(n_way=5).split_classes()
    with pytest.raises(DataError, match="got 1; draw an episode of 2 or 2 ways"):
        task._replace(n_way=1).split_classes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_y": Y[:3]}, r"query_y of dtype int64 and shape \(n,\), .*got torch.int64 of shape \(3,\) for query_x"),
        ({"support_y": Y.float()}, "support_y of dtype int64"),
        ({"query_y": Y[None]}, "query_y of dtype int64"),
        ({"query_x": X[:0], "query_y": Y[:0]}, "at least one query, got none"),
        ({"support_x": X[:0], "support_y": Y[:0]}, "at least one support, got none"),
        ({"n_way": torch.tensor(2)}, "n_way to be a Python int"),
        ({"query_x": X[:, :1]}, r"supports and queries of one shape, got \(2,\) and \(1,\)"),
        ({"query_x": X.tolist()}, "need query_x and query_y as tensors, got list and Tensor; Task.of"),
        ({"n_way": True}, "n_way to be a Python int of at least 1, got True"),
        ({"n_way": 0}, "n_way to be a Python int of at least 1, got 0"),
        ({"query_y": Y * 7}, r"query labels in 0 … 1, got \[0, 7\]"),
        ({"support_y": Y - 1}, r"support labels in 0 … 1, got \[-1, 0\]"),
        ({"n_way": 3}, r"a support of each of the 3 classes, got none of \[2\]"),
        ({"support_y": Y * 0}, r"got none of \[1\]"),
    ],
)
def test_check_names_the_field(change, message):
    task = Task(X, Y, X, Y, 2)
    assert task.check() is task
    with pytest.raises(DataError, match=message):
        task._replace(**change).check()


def test_labels_of_a_device_are_read_only_when_asked_for():
    x, y = torch.empty(4, 2, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    task = Task(x, y, x, y, 2)
    assert task.check() is task and task.check(labels=False) is task
    with pytest.raises(RuntimeError):  # a meta tensor has no values to read
        task.check(labels=True)
    wrong = Task(X, Y * 9, X, Y, 2)
    assert wrong.check(labels=False) is wrong


def test_labels_from_batches_and_uneven_queries():
    task = Task.from_batch(torch.arange(4.0)[:, None], torch.tensor([0.0, 1.0, 0.0, 1.0]), shots=1, n_way=2)
    assert task.query_y.dtype == torch.int64
    assert Task.from_batch(torch.randn(4, 1), torch.tensor([0, 1, 0, 1]).to(torch.uint8), shots=1, n_way=2).check()
    with pytest.raises(DataError, match="need integer labels"):
        Task.from_batch(torch.randn(2, 1), torch.tensor([0.5, 1.0]), shots=1, n_way=2)


def test_to_moves_every_tensor():
    x, y = torch.randn(2, 1), torch.arange(2)
    task = Task(x, y, x, y, 2).to("meta")
    assert all(t.device.type == "meta" for t in task[:4]) and task.n_way == 2
