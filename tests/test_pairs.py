import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from l2g_meta import Task
from l2g_meta.data import ClassDataset, Episodes, MapDataset, TaskPairs
from l2g_meta.data.sources import disjoint_classes
from l2g_meta.data.stream import generator
from l2g_meta.errors import DataError


def numbered(n_classes, size, **options):
    """Each input is its own row number, so that a task says which rows it holds."""
    n = n_classes * size
    return ClassDataset(torch.arange(float(n))[:, None], torch.arange(n) // size, **options)


def classes_of(task, size):
    return set((torch.cat([task.support_x, task.query_x]).flatten() // size).long().tolist())


@pytest.mark.parametrize("draws", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_shared_class_in_many_draws(draws):
    pairs = TaskPairs(numbered(12, 2), ways=5, outer_ways=(2, 7), shots=1, queries=1)
    for k in range(draws):
        rng = generator(pairs.seed, k)
        shapes = tuple(shape.draw(rng) for shape in pairs.shapes)
        chosen_i, chosen_j = disjoint_classes(rng, 12, [ways for ways, _, _ in shapes])
        assert len(np.unique(np.concatenate([chosen_i, chosen_j]))) == shapes[0][0] + shapes[1][0]


def test_loaded_pairs_are_disjoint_and_well_formed():
    pairs = TaskPairs(numbered(12, 9), ways=4, shots=2, queries=3, outer_ways=6, outer_shots=1, outer_queries=5)
    for k in range(50):
        task_i, task_j = pairs[k]
        assert classes_of(task_i, 9).isdisjoint(classes_of(task_j, 9))
        for task, (n, shots, queries) in ((task_i, (4, 2, 3)), (task_j, (6, 1, 5))):
            task.check()
            assert task.n_way == n and len(task.support_y) == n * shots and len(task.query_y) == n * queries
            rows = torch.cat([task.support_x, task.query_x]).flatten()
            assert len(rows.unique()) == len(rows)  # no image twice
            labels = torch.cat([task.support_y, task.query_y])
            for c in range(n):  # one class of the data set behind each label
                assert len((rows[labels == c] // 9).unique()) == 1


def test_the_same_pair_for_the_same_seed_and_index_in_any_order():
    data = numbered(12, 6)
    options = dict(ways=(3, 4, 5), shots=(1, 2), queries=2)
    forward = [TaskPairs(data, **options, seed=3)[k] for k in range(10)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    backward = TaskPairs(data, **options, seed=3)
    for k in reversed(range(10)):
        for a, b in zip(forward[k], backward[k], strict=True):
            assert a.n_way == b.n_way and all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    other = TaskPairs(data, **options, seed=4)
    assert any(
        other[k][0].n_way != forward[k][0].n_way or not torch.equal(other[k][0].support_x, forward[k][0].support_x)
        for k in range(3)
    )


def test_no_global_generator_is_used():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    TaskPairs(numbered(10, 4), ways=5, shots=1, queries=2)[0]
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def test_sets_arrays_and_seeds():
    data = numbered(8, 6)
    for ways in ({2, 3}, (2, 3), np.array([2, 3])):
        assert TaskPairs(data, ways=ways, shots=1, queries=1)[1][0].n_way in (2, 3)
    with pytest.raises(DataError, match="a seed of integers of at least 0, got -1"):
        TaskPairs(data, ways=2, shots=1, queries=1, seed=-1)


def test_items_that_are_no_tensors_are_explained():
    class Pictures(Letters):
        def __getitem__(self, i):
            return object(), self.targets[i]

    with pytest.raises(DataError, match="tensors x of one shape"):
        TaskPairs(Pictures(), ways=1, shots=1, queries=1)[0]


def test_sets_to_draw_from_are_all_used():
    pairs = TaskPairs(numbered(14, 8), ways=5, shots=5, queries=2, outer_ways=(5, 7, 9), outer_shots=(1, 5))
    drawn = {(j.n_way, len(j.support_y) // j.n_way) for _, j in (pairs[k] for k in range(80))}
    assert drawn == {(w, s) for w in (5, 7, 9) for s in (1, 5)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ways=10), r"a disjoint pair needs 20 classes, the split has 16; lower ways to 8 each"),
        (dict(queries=9), r"needs 10 examples of every class, 16 of 16 .*lower shots \+ queries to 6"),
        (dict(ways=0), "ways to be a positive integer"),
        (dict(outer_shots=[]), "outer_shots to be a positive integer or a set"),
        (dict(shots=1.5), "shots"),
    ],
)
def test_too_little_data_says_what_would_fit(options, message):
    with pytest.raises((DataError, TypeError), match=message):
        TaskPairs(numbered(16, 6), **{**dict(ways=5, shots=1, queries=2), **options})


def test_episodes_give_single_tasks_and_their_rows():
    episodes = Episodes(numbered(5, 6), ways=5, shots=2, queries=3, seed=(7, 1))
    task, rows = episodes[4], episodes.rows(4)
    assert task.support_x.flatten().tolist() == rows.support.tolist()
    assert task.query_x.flatten().tolist() == rows.query.tolist()
    with pytest.raises(DataError, match="a task needs 6 classes, the split has 5; lower ways to 5, or add classes$"):
        Episodes(numbered(5, 6), ways=6, shots=1, queries=1)
    with pytest.raises(IndexError):
        episodes[-1]


class Letters(Dataset):
    targets = ["b", "a", "b", "a", "c", "c"]

    def __getitem__(self, i):
        return torch.full((1, 2, 2), float(i)), self.targets[i]

    def __len__(self):
        return 6


def test_any_map_style_data_set_plugs_in():
    task_i, task_j = TaskPairs(Letters(), ways=1, outer_ways=2, shots=1, queries=1)[0]
    assert task_i.support_x.shape == (1, 1, 2, 2) and task_j.n_way == 2
    data = MapDataset(Letters())
    assert data.class_names == ("a", "b", "c") and [r.tolist() for r in data.index] == [[1, 3], [0, 2], [4, 5]]
    tensors = TensorDataset(torch.arange(6.0)[:, None], torch.tensor([1, 0, 1, 0, 5, 5]))
    assert [r.tolist() for r in MapDataset(tensors).index] == [[1, 3], [0, 2], [4, 5]]
    subset = MapDataset(Subset(Letters(), [4, 0, 5, 2]))
    assert subset.class_names == ("b", "c") and subset.gather([1]).unique() == 0
    with pytest.raises(DataError, match="neither `targets` nor `labels`"):
        TaskPairs([(1, 2)], ways=1, shots=1, queries=1)


def test_uint8_images_are_normalised_when_gathered():
    images = torch.randint(0, 256, (4, 5, 6, 3), dtype=torch.uint8)
    data = ClassDataset(images, [0, 0, 1, 1], mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    x = data.gather([2])
    expected = (images[2].permute(2, 0, 1) / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor(
        [0.5, 0.6, 0.7]
    )[:, None, None]
    torch.testing.assert_close(x[0], expected)
    assert data.image_shape == (3, 5, 6) and len(data) == 4


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1], (), "one label per image"),
        ([0, 0, 2], (), "none of class 1; number the classes without gaps"),
        ([0, 0, -1], (), "integer labels from 0"),
        ([0, 0, 1], ("a",), "one name per class"),
        (["a", "a", "b"], (), "integer labels from 0"),
    ],
)
def test_class_dataset_errors(labels, names, message):
    with pytest.raises(DataError, match=message):
        ClassDataset(torch.randn(3, 1), labels, names)


def test_channels_come_last_in_uint8_images():
    with pytest.raises(DataError, match=r"uint8 images of shape \(n, H, W, 1 or 3\), got \(3, 1, 8, 8\)"):
        ClassDataset(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), [0, 0, 1])


OPTIONS = dict(ways=2, shots=1, queries=2, seed=5)
STREAMS = pytest.mark.parametrize("stream", [TaskPairs, Episodes])


def rows(item):
    """Which rows of the data set a task, or a pair of them, holds."""
    tasks = [item] if isinstance(item, Task) else item
    return [x.flatten().tolist() for task in tasks for x in (task.support_x, task.query_x)]


@STREAMS
def test_with_a_length_a_stream_is_a_sequence(stream):
    endless, seven = (stream(numbered(8, 6), **OPTIONS, length=length) for length in (None, 7))
    expected = [rows(endless[k]) for k in range(7)]
    assert len(seven) == 7
    assert [rows(item) for item in seven] == [rows(item) for item in seven] == expected  # it ends, and begins again
    assert [rows(item) for item in seven[2:5]] == expected[2:5] and isinstance(seven[2:5], list)
    assert [rows(item) for item in seven[-2::-3]] == expected[-2::-3] and seven[5:2] == [] and len(seven[5:99]) == 2
    assert rows(seven[-1]) == rows(seven[np.int64(6)]) == expected[6] and rows(seven[-7]) == expected[0]
    for k in (7, -8):
        with pytest.raises(IndexError, match=f"need a position in -7 … 6, got {k}; raise length"):
            seven[k]
    assert rows(seven.batch([9])[0]) == rows(endless[9])  # the stream goes on
    for length in (0, -1, 2.5):
        with pytest.raises(DataError, match=f"length to be a positive integer or None, got {length}"):
            stream(numbered(8, 6), **OPTIONS, length=length)


@STREAMS
@pytest.mark.parametrize(
    "use", [len, iter, list, lambda s: s[1:3], lambda s: s.loader(), lambda s: list(DataLoader(s))]
)
def test_without_a_length_there_is_no_end(stream, use):
    with pytest.raises(TypeError, match=rf"need a length .*; give {stream.__name__}\(..., length=N\)"):
        use(stream(numbered(8, 6), **OPTIONS))
    with pytest.raises(IndexError, match="a position of at least 0, got -1"):
        stream(numbered(8, 6), **OPTIONS)[-1]


@STREAMS
@pytest.mark.parametrize(
    "options", [{}, {"workers": 2}, {"workers": 1, "persistent_workers": True, "prefetch_factor": 4}], ids=str
)
def test_a_loader_gives_unbatched_items_of_each_epoch(stream, options):
    endless, five = (stream(numbered(8, 6), **OPTIONS, length=length) for length in (None, 5))
    loader = five.loader(**options)
    assert len(loader) == 5
    for epoch in (0, 1, 3, 0):
        loader.sampler.set_epoch(epoch)
        items = list(loader)
        assert [rows(item) for item in items] == [rows(endless[5 * epoch + k]) for k in range(5)]
        for item in items:
            for task in [item] if stream is Episodes else item:
                assert type(task) is Task and type(task.n_way) is int and task.check() is task
    assert [rows(item) for item in loader] == [rows(item) for item in five]  # the epoch stays until it is set


@STREAMS
def test_a_loader_keeps_to_single_items_in_order(stream):
    five = stream(numbered(8, 6), **OPTIONS, length=5)
    for option in ({"batch_size": 2}, {"shuffle": True}, {"sampler": [0]}, {"drop_last": True}, {"workers": -1}):
        with pytest.raises((TypeError, ValueError)):  # PyTorch's own
            five.loader(**option)
    assert stream(numbered(8, 6), **OPTIONS) and five  # true with and without a length


def test_workers_need_tasks_on_the_cpu():
    pairs = TaskPairs(numbered(8, 6), **OPTIONS, length=3)
    pairs.device = "cuda:0"  # as where the data is there, too
    with pytest.raises(DataError, match="got device=cuda:0; leave device out and move each task"):
        pairs.loader(workers=1)
    assert len(pairs.loader()) == 3
