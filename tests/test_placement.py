"""Data on the device if it fits, else on the host: the same tasks either way."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from l2g_meta import Conv4, MetricModel, PrototypicalHead
from l2g_meta.data import ClassDataset, Episodes, TaskPairs
from l2g_meta.data import host as placement
from l2g_meta.data.augment import Augment
from l2g_meta.data.cache import create_images, open_dataset, write_classes
from l2g_meta.data.host import fits, free_memory, placed
from l2g_meta.evaluation.episodes import evaluate

IMAGES = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
LABELS = np.arange(60) // 6
UINT8 = ClassDataset(IMAGES, LABELS, name="noise", split="train", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
FLOAT = ClassDataset(torch.randn(60, 5), LABELS)
SHAPE = {"ways": 3, "shots": 1, "queries": 2}
CPU = torch.device("cpu")


def varied(augment, n, seed=1):
    """Reads n images through draws of ``augment``."""
    return partial(augment.gather, draws=augment.draw(np.random.default_rng(seed), n, (16, 16)))


@pytest.fixture
def crowded(monkeypatch):
    """A device whose free memory the images do not fit in."""
    placement._say_once.cache_clear()
    monkeypatch.setattr(placement, "free_memory", lambda device: IMAGES.nbytes)
    yield
    placement._say_once.cache_clear()


@pytest.mark.parametrize(
    "size, free, expected", [(66, 100, True), (67, 100, False), (10**12, None, True), (0, 0, True)]
)
def test_images_leave_a_third_of_the_free_memory(size, free, expected):
    assert fits(size, free) is expected


def test_a_cpu_has_no_limit_and_nothing_moves():
    assert free_memory(CPU) is None
    assert placed(UINT8, None) is UINT8 and placed(UINT8, "cpu").images is UINT8.images


@pytest.mark.parametrize("data", [UINT8, FLOAT], ids=["uint8", "float"])
@pytest.mark.parametrize("rows", [[5, 0, 59, 5], np.array([3]), torch.tensor([], dtype=torch.long)], ids=str)
def test_gathered_inputs_are_the_resident_ones(data, rows):
    found = replace(data, gathered_on=CPU).gather(rows)
    assert torch.equal(found, data.gather(rows)) and len(found) == len(rows)


def test_varied_inputs_are_the_resident_ones():
    vary = varied(Augment(2), 7)
    rows = [1, 30, 2, 2, 59, 0, 17]
    found = replace(UINT8, gathered_on=CPU).gather(rows, vary=vary)
    assert torch.equal(found, UINT8.gather(rows, vary=vary)) and not torch.equal(found, UINT8.gather(rows))


def test_inputs_are_made_on_the_device():
    """The meta device computes shapes alone: whatever stayed on the host would not mix with it."""
    host = replace(UINT8, gathered_on=torch.device("meta"))
    for vary in (None, varied(Augment(2), 2)):
        x = host.gather([1, 30], vary=vary)
        assert x.device.type == "meta" and x.shape == (2, 3, 16, 16) and UINT8.images.device == CPU


def test_a_memory_map_is_read_as_it_lies(tmp_path):
    create_images(tmp_path, IMAGES.shape)[:] = IMAGES
    write_classes(tmp_path, LABELS, [str(c) for c in range(10)])
    data = open_dataset(tmp_path, name="noise", split="train")
    host = replace(data, gathered_on=CPU)
    assert host.images.data_ptr() == data.images.data_ptr()
    assert torch.equal(host.gather([7, 8]), data.gather([7, 8]))


@pytest.mark.parametrize("augment", [None, Augment(2)])
def test_tasks_are_the_same_and_it_is_said_once(crowded, augment, recwarn):
    pairs = TaskPairs(UINT8, **SHAPE, seed=3, augment=augment, device="cpu")
    assert pairs.source.dataset.gathered_on == CPU
    resident = TaskPairs(UINT8, **SHAPE, seed=3, augment=augment)
    for pair, expected in zip(pairs.batch([0, 4]), resident.batch([0, 4]), strict=True):
        for task, other in zip(pair, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(task[:4], other[:4], strict=True))
    Episodes(UINT8, **SHAPE, device="cpu")
    assert [str(w.message)[:52] for w in recwarn] == ["need 0.0 GB on cpu for the images of noise train, wh"]


@pytest.mark.filterwarnings("ignore:need .* GB on cpu")
def test_evaluation_is_the_same(crowded, monkeypatch):
    model = MetricModel(Conv4(3, 4), PrototypicalHead())
    host = evaluate(model, UINT8, **SHAPE, episodes=5, device="cpu")
    assert host.split == "train"
    monkeypatch.setattr(placement, "free_memory", lambda device: None)
    assert host == evaluate(model, UINT8, **SHAPE, episodes=5, device="cpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_gathered_inputs_are_the_resident_ones():
    cuda = torch.device("cuda")
    resident, host = UINT8.to(cuda), replace(UINT8, gathered_on=cuda)
    for k in range(20):  # pinned memory is used again and again
        rng = np.random.default_rng(k)
        rows = rng.integers(0, 60, 30)
        for options in ({}, {"vary": varied(Augment(2), 30, k)}):
            assert torch.equal(host.gather(rows, **options), resident.gather(rows, **options))
    assert free_memory(cuda) > 0 and placed(UINT8, "cuda").gathered_on is None
