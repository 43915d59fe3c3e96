import json

import glyph_selection as selection
import numpy as np
import pytest
from PIL import ImageFont

from l2g_meta.data.sets import glyphs
from l2g_meta.errors import DataError

AT_LEAST = {"train": 300, "validation": 60, "test": 100}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2G_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield {split: glyphs.load(split) for split in glyphs.SPLITS}


def scripts_and_codes(dataset):
    names = [name.rsplit("/U+", 1) for name in dataset.class_names]
    return [script for script, _ in names], [int(code, 16) for _, code in names]


@pytest.fixture(scope="module")
def codes(data):
    return {code for dataset in data.values() for code in scripts_and_codes(dataset)[1]}


@pytest.mark.parametrize("split", glyphs.SPLITS)
def test_counts_and_types(data, split):
    dataset = data[split]
    assert dataset.n_classes >= AT_LEAST[split]
    assert {len(rows) for rows in dataset.index} == {30}
    assert str(dataset.images.dtype) == "torch.uint8"
    assert tuple(dataset.images.shape) == (30 * dataset.n_classes, 28, 28, 1)
    assert dataset.gather([0, 1]).shape == (2, 1, 28, 28)
    assert (dataset.name, dataset.split) == ("glyphs", split)


def test_splits_share_no_script_and_no_character(data):
    found = [scripts_and_codes(data[split]) for split in glyphs.SPLITS]
    for part in (0, 1):
        sets = [set(pair[part]) for pair in found]
        assert len(set.union(*sets)) == sum(len(s) for s in sets)
    assert all(len(set(characters)) == len(characters) for _, characters in found)
    assert "greek/U+03B1" not in data["test"].class_names and "georgian/U+10D3" in data["test"].class_names


def test_letters_are_those_that_were_chosen():
    assert tuple(letter for split in selection.SCRIPTS for letter in glyphs.letters(split)) == selection.classes()


def test_no_two_classes_look_alike(codes):
    faces = glyphs.read_faces()
    fonts = {name: glyphs.open_font(name, selection.EM) for name in selection.COMPARED}
    drawn = [(code, glyphs.draw(fonts[name], code)) for code in sorted(codes) for name in fonts if code in faces[name]]
    owners = np.array([code for code, _ in drawn])
    alike = selection.similarity([selection.body(image) for _, image in drawn])
    assert alike[owners[:, None] != owners].max() <= selection.THRESHOLD
    assert np.allclose(np.diag(alike), 1)


LOOK_ALIKES = [
    "A\u0391\u0410",  # Latin, Greek, Cyrillic
    "oO\u03bf\u043e\u0585",  # Latin, Greek, Cyrillic, Armenian
    "cC\u0441\u0421",
    "xX\u0445\u0425",
    "pP\u0440\u0420\u03c1",
    "Il\u0406\u04c0",
    "\u140a\u140b\u1418",  # Canadian syllabics a, aa, wa: without and with a dot
]


@pytest.mark.parametrize("group", LOOK_ALIKES)
def test_look_alikes_are_one_class(codes, group):
    assert len(codes & {ord(character) for character in group}) <= 1


def test_latin_a_is_a_class(codes):
    assert codes & {0x41, 0x391, 0x410}


def test_accented_letters_are_absent(codes):
    accented = "éèêëàäöüñçÁÉÖÜŠžάέόώйїёЙЁ" + "đøłɓƙ" + "ﬁǆ"
    assert not codes & {ord(character) for character in accented}


def test_same_bytes_when_built_again_elsewhere(data, tmp_path, monkeypatch):
    monkeypatch.setenv("L2G_CACHE", str(tmp_path))
    again = glyphs.load("validation")
    assert again.class_names == data["validation"].class_names
    assert again.images.numpy().tobytes() == data["validation"].images.numpy().tobytes()


def test_cached_build_is_not_repeated(data, tmp_path, monkeypatch):
    monkeypatch.setenv("L2G_CACHE", str(tmp_path))
    glyphs.load("validation", root="unused", download=True)
    monkeypatch.setattr(glyphs, "build", None)
    glyphs.load("validation")
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("glyphs-validation-28-")
    assert json.loads((folder / "classes.json").read_text())[0].startswith("armenian/U+")


def test_other_image_size(data, tmp_path, monkeypatch):
    monkeypatch.setenv("L2G_CACHE", str(tmp_path))
    large = glyphs.load("validation", image_size=56)
    assert tuple(large.images.shape[1:]) == (56, 56, 1)
    assert large.class_names == data["validation"].class_names
    # The same jitter at any size: halved, the images are about the same.
    small = data["validation"].images.numpy()[..., 0].astype(float)
    halved = large.images.numpy()[..., 0].reshape(-1, 28, 2, 28, 2).mean((2, 4))
    assert np.corrcoef(small.ravel(), halved.ravel())[0, 1] > 0.95


def test_errors():
    with pytest.raises(DataError, match="got 'valid'; choose one of train, validation, test"):
        glyphs.load("valid")
    with pytest.raises(DataError, match="got image_size=0"):
        glyphs.load("train", image_size=0)


@pytest.mark.parametrize("split", glyphs.SPLITS)
def test_images_show_a_whole_character(data, split):
    images = data[split].images.numpy()[..., 0]
    assert (images.max((1, 2)) > 128).all()
    assert ((images > 128).mean((1, 2)) > 0.01).all()
    border = np.concatenate([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], axis=1)
    assert (border.max(1) > 128).mean() < 0.01  # ink that reaches the border may be cut off


@pytest.mark.parametrize("split", glyphs.SPLITS)
def test_examples_of_a_class_differ(data, split):
    images = data[split].images.numpy().reshape(-1, 30, 28 * 28)
    assert all(len({example.tobytes() for example in examples}) == 30 for examples in images)


def test_mean_and_std_are_those_of_train(data):
    images = data["train"].images.numpy() / 255
    assert images.mean() == pytest.approx(glyphs.MEAN[0], abs=5e-4)
    assert images.std() == pytest.approx(glyphs.STD[0], abs=5e-4)


def test_body_leaves_dots_out_and_refuses_pieces():
    font = glyphs.open_font("Sans", selection.EM)
    whole = glyphs.draw(font, ord("i"))
    assert selection.body(whole).size[1] < whole.size[1]
    assert selection.body(glyphs.draw(font, 0x22EE)) is None  # vertical ellipsis: three equal dots


def test_faces_without_the_glyph_are_not_used():
    faces = glyphs.read_faces()
    assert 0x05D0 in faces["Sans"] and 0x05D0 not in faces["Serif"]  # Hebrew alef
    assert set(faces) == set(glyphs.FACES) and len(glyphs.FACES) == 12
    assert isinstance(glyphs.open_font("Serif", 12), ImageFont.FreeTypeFont)
