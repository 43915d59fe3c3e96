import pytest
import torch

from l2g_meta import Task
from l2g_meta.errors import DataError
from l2g_meta.task import split_queries


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
    ("y", "shots", "message"),
    [
        ([0, 0, 5, 5], 1, r"labels 0 … 1 for n_way=2, got 0 … 5; .*RemapLabels"),
        ([0, 0, 1], 1, r"more than shots=1 .* got \[2, 1\] per class"),
        ([0, 0, 1, 1], 2, "lower shots"),
        ([0, 0], 1, "one label per input"),
    ],
)
def test_from_batch_errors(y, shots, message):
    with pytest.raises(DataError, match=message):
        Task.from_batch(torch.randn(max(len(y), 3), 1), torch.tensor(y), shots=shots, n_way=2)


def test_check_names_the_field():
    x, y = torch.randn(4, 1), torch.tensor([0, 1, 0, 1])
    with pytest.raises(DataError, match=r"query_y of dtype int64 and shape \(4,\)"):
        Task(x, y, x, y[:3], 2).check()
    with pytest.raises(DataError, match="support_y of dtype int64"):
        Task(x, y.float(), x, y, 2).check()
    with pytest.raises(DataError, match=r"query labels in 0 … 1, got \[0, 7\]"):
        Task(x, y, x, torch.tensor([0, 7, 0, 7]), 2).check()
    with pytest.raises(DataError, match=r"a support for each of the 3 classes, got none for \[2\]"):
        Task(x, y, x, y, 3).check()


def test_split_queries_shares_supports_and_no_query():
    x, y = torch.arange(8.0)[:, None], torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    inner, outer = split_queries(Task(x[:2], torch.arange(2), x, y, 2))
    assert torch.equal(inner.support_x, outer.support_x) and inner.query_y.tolist() == outer.query_y.tolist()
    assert set(inner.query_x.flatten().tolist()).isdisjoint(outer.query_x.flatten().tolist())


def test_labels_from_batches_and_uneven_queries():
    task = Task.from_batch(torch.arange(4.0)[:, None], torch.tensor([0.0, 1.0, 0.0, 1.0]), shots=1, n_way=2)
    assert task.query_y.dtype == torch.int64
    assert Task.from_batch(torch.randn(4, 1), torch.tensor([0, 1, 0, 1]).to(torch.uint8), shots=1, n_way=2).check()
    with pytest.raises(DataError, match="need integer labels"):
        Task.from_batch(torch.randn(2, 1), torch.tensor([0.5, 1.0]), shots=1, n_way=2)
    x, y = torch.randn(4, 1), torch.tensor([0, 0, 0, 1])
    with pytest.raises(DataError, match="an even number of queries"):
        split_queries(Task(x, y, x, y, 2))


def test_to_moves_every_tensor():
    x, y = torch.randn(2, 1), torch.arange(2)
    task = Task(x, y, x, y, 2).to("meta")
    assert all(t.device.type == "meta" for t in task[:4]) and task.n_way == 2
