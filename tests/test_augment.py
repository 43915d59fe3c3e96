"""Augmentation on the device: as torchvision and Pillow do it, reproducible, and of the same pairs as without."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torchvision.transforms.v2 import functional as tv

from l2g_meta.cli.main import main
from l2g_meta.data.augment import Augment, Draws
from l2g_meta.data.dataset import ClassDataset
from l2g_meta.data.pairs import TaskPairs
from l2g_meta.errors import DataError


def images(n=6, size=12, channels=3):
    return torch.randint(0, 256, (n, size, size, channels), dtype=torch.uint8)


def gather(x, rows, draws):
    return Augment().gather(x, rows, draws)


def one(shift=(0, 0), flip=False, factor=(1, 1, 1)):
    return Draws(np.array([shift]), np.array([flip]), np.array([factor], np.float32))


def test_nothing_drawn_is_the_image():
    x = images()
    nothing = Draws(np.zeros((6, 2), int), np.zeros(6, bool), np.ones((6, 3), np.float32))
    torch.testing.assert_close(gather(x, torch.arange(6), nothing), x / 255)


@pytest.mark.parametrize("shift", [(0, 0), (3, -2), (-4, 4), (12, 0)])
@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_are_torchvisions(shift, flip):
    x = images(1)
    planes = x[0].permute(2, 0, 1)
    canvas = tv.pad(planes, [12, 12])
    expected = tv.crop(canvas, 12 + shift[0], 12 + shift[1], 12, 12)
    expected = tv.horizontal_flip(expected) if flip else expected
    found = gather(x, torch.tensor([0]), one(shift, flip))[0].permute(2, 0, 1)
    torch.testing.assert_close(found, expected / 255)


@pytest.mark.parametrize("factor", [(0.6, 1, 1), (1, 0.6, 1), (1, 1, 0.6), (1.4, 0.7, 1.3)])
def test_colours_are_torchvisions_and_pillows(factor):
    x = images(1)
    expected = x[0].permute(2, 0, 1) / 255
    picture = Image.fromarray(x[0].numpy())
    steps = [
        (tv.adjust_brightness, ImageEnhance.Brightness),
        (tv.adjust_contrast, ImageEnhance.Contrast),
        (tv.adjust_saturation, ImageEnhance.Color),
    ]
    for (function, enhance), value in zip(steps, factor, strict=True):
        expected, picture = function(expected, value), enhance(picture).enhance(value)
    found = gather(x, torch.tensor([0]), one(factor=factor))[0]
    torch.testing.assert_close(found.permute(2, 0, 1), expected, rtol=1e-4, atol=2e-3)  # its weights have 4 digits
    torch.testing.assert_close(found * 255, torch.from_numpy(np.array(picture)).float(), rtol=0, atol=3.0)


def test_one_channel_and_other_rows():
    x = images(channels=1)
    draws = Draws(np.zeros((2, 2), int), np.array([True, False]), np.ones((2, 3), np.float32))
    found = gather(x, torch.tensor([4, 1]), draws)
    torch.testing.assert_close(found, torch.stack([x[4].flip(1), x[1]]) / 255)


def test_pairs_are_the_same_pairs_varied_reproducibly():
    data = ClassDataset(images(60), np.repeat(np.arange(10), 6))
    shape = {"ways": 3, "shots": 1, "queries": 2, "seed": 4}
    plain, varied, again = TaskPairs(data, **shape), *(TaskPairs(data, **shape, augment=Augment(2)) for _ in range(2))
    for k in (5, 0):
        for p, v, a in zip(plain[k], varied[k], again.batch([7, k])[1], strict=True):
            assert torch.equal(v.support_x, a.support_x) and torch.equal(v.query_x, a.query_x)
            assert not torch.equal(v.query_x, p.query_x)
    still = TaskPairs(data, **shape, augment=Augment(0, 0.0, 0.0))
    for p, s in zip(plain[3], still[3], strict=True):
        torch.testing.assert_close(s.query_x, p.query_x)


def test_a_batch_is_its_pairs():
    data = ClassDataset(images(60), np.repeat(np.arange(10), 6))
    pairs = TaskPairs(data, ways={2, 3}, shots=1, queries=2, outer_queries=3)
    for k, pair in zip((4, 2, 9), pairs.batch([4, 2, 9]), strict=True):
        for found, expected in zip(pair, pairs[k], strict=True):
            for f, e in zip(found, expected, strict=True):
                assert torch.equal(f, e) if isinstance(f, torch.Tensor) else f == e


def test_what_cannot_be_augmented_is_refused():
    floats = ClassDataset(torch.randn(40, 3, 8, 8), np.arange(40) // 4)
    with pytest.raises(DataError, match="need a ClassDataset of uint8 images to augment"):
        TaskPairs(floats, ways=3, shots=1, queries=2, augment=Augment())
    for wrong in ({"padding": -1}, {"flip": 1.5}, {"jitter": -0.1}):
        with pytest.raises(DataError, match="need padding of at least 0"):
            Augment(**wrong)


def test_flag_of_the_command_line(tmp_path):
    flags = "--iterations 1 --pairs 1 --queries 1 --eval-episodes 1 --image-size 28 --device cpu --augment".split()
    assert main(["train", *flags, "--out", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["augment"] is True
