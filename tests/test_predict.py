import csv
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn

from l2g_meta import FewShotClassifier
from l2g_meta.classify import photo_folder as folder
from l2g_meta.classify.photos import Preparation
from l2g_meta.cli.main import main
from l2g_meta.files.tensors import load_tensors


@pytest.fixture
def photos(tmp_path, blobs):
    """Three classes: two examples of each, and four images to classify, in folders named as the classes."""
    blobs(tmp_path / "all", 3, 6, seed=9)
    for name in ("class00", "class01", "class02"):
        for kind, numbers in (("support", range(2)), ("query", range(2, 6))):
            (tmp_path / kind / name).mkdir(parents=True)
            for k in numbers:
                shutil.copy(tmp_path / "all" / name / f"{k}.png", tmp_path / kind / name)
    return tmp_path


def predict(run, photos, *more, query=None):
    query = [photos / "query"] if query is None else query
    command = ["predict", "--model", run, "--support", photos / "support", "--query", *query, "--device", "cpu", *more]
    return main(list(map(str, command)))


def test_a_table(blob_run, photos, capsys):
    assert predict(blob_run, photos) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "class", "probability", "nearest"] and len(lines) == 1 + 12 + 3
    file, label, probability, nearest = lines[1].split()
    assert file == str(photos / "query" / "class00" / "2.png") and label.startswith("class")
    assert 1 / 3 <= float(probability) <= 1 and os.path.dirname(nearest).startswith(str(photos / "support"))
    assert "12 images classified from 6 examples of 3 classes; probabilities are not calibrated" in lines[-3]
    assert lines[-2].endswith(" ms per image, reading it included")
    assert "% right of the 12 in folders named as a class" in lines[-1]


def test_one_json_document_and_nothing_else(blob_run, photos, capsys):
    assert predict(blob_run, photos, "--json", "--batch-size", "5") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["classes"] == ["class00", "class01", "class02"] and document["labelled"] == 12
    rows = document["predictions"]
    assert len(rows) == document["classified"] == 12 and document["unreadable"] == []
    right = sum(row["class"] == os.path.basename(os.path.dirname(row["file"])) for row in rows)
    assert document["right"] == right > 6


def test_a_csv_file(blob_run, photos, capsys):
    target = photos / "rows.csv"
    assert predict(blob_run, photos, "--csv", target, "--batch-size", "5") == 0
    assert all(line.startswith('"') and line.count('"') == 8 for line in target.read_text().splitlines())
    with open(target, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == sorted(row["file"] for row in rows) and len(rows) == 12
    out = capsys.readouterr().out
    assert str(target) in out and "query" not in out


def test_the_nearest_support_of_a_support_is_itself(blob_run, photos, capsys):
    files = sorted((photos / "support").glob("*/*.png"))
    assert predict(blob_run, photos, "--json", query=files) == 0
    for file, row in zip(files, json.loads(capsys.readouterr().out)["predictions"], strict=True):
        assert row["file"] == row["nearest"] == str(file)


def test_unreadable_images_are_listed_and_skipped(blob_run, photos, capsys):
    (photos / "query" / "class01" / "3.png").write_bytes(b"no image")
    (photos / "query" / "photo.heic").write_bytes(b"of a kind that is not read")
    (photos / "query" / "notes.txt").write_text("passed over")
    (photos / "query" / ".hidden.png").write_bytes(b"passed over")
    (photos / "support" / "class00" / "0.png").write_bytes(b"")
    assert predict(blob_run, photos, "--json", "--batch-size", "1") == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert len(document["predictions"]) == 11 and document["examples"] == 5
    listed = [os.path.basename(entry["file"]) for entry in document["unreadable"]]
    assert listed == ["0.png", "photo.heic", "3.png"]
    assert [line.split(":")[1].split("/")[-1] for line in err.splitlines() if line.startswith("l2g: skipped")] == listed
    assert predict(blob_run, photos) == 1
    assert "3 skipped; listed on the error output" in capsys.readouterr().out


def test_nothing_that_can_be_read_and_a_picture_beside_the_classes(blob_run, photos, capsys):
    shutil.copy(photos / "support" / "class00" / "0.png", photos / "support" / "loose.png")
    assert predict(blob_run, photos) == 1
    assert "loose.png: it lies in no folder of a class; move it into one" in capsys.readouterr().err
    for file in (photos / "query").glob("*/*.png"):
        file.write_bytes(b"")
    assert predict(blob_run, photos) == 2
    out, err = capsys.readouterr()
    assert "need an image that can be read to classify, got 12 that cannot" in err and not out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: shutil.rmtree(p / "query"), "there is no"),
        (lambda p: [shutil.rmtree(d) for d in (p / "query").iterdir()], "got none in"),
        (lambda p: shutil.rmtree(p / "support"), "need a folder of one folder per class"),
        (lambda p: [shutil.rmtree(d) for d in (p / "support").iterdir()], "got no folder"),
        (lambda p: [shutil.rmtree(d) for d in sorted((p / "support").iterdir())[1:]], "the class ['class00'] alone"),
        (lambda p: [f.unlink() for f in (p / "support" / "class01").iterdir()], "got no image in ['class01']"),
        (lambda p: [f.write_bytes(b"") for f in (p / "support" / "class01").iterdir()], "a readable image of class"),
    ],
)
def test_folders_that_cannot_be_used(change, message, blob_run, photos, capsys):
    change(photos)
    assert predict(blob_run, photos) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_written_or_is_no_model(blob_run, photos, capsys):
    assert predict(blob_run, photos, "--csv", photos / "new" / "rows.csv") == 0
    assert (photos / "new" / "rows.csv").exists()
    capsys.readouterr()
    assert predict(blob_run, photos, "--csv", photos / "new" / "rows.csv" / "rows.csv") == 2
    assert "need a file to write for --csv" in capsys.readouterr().err
    assert predict(photos, photos) == 2
    assert "need a folder made by `l2g train`" in capsys.readouterr().err


def test_files_are_read_batch_by_batch(photos, monkeypatch):
    read = []
    monkeypatch.setattr(Preparation, "read", lambda self, file: read.append(file) or np.zeros((4, 4, 3), np.uint8))
    files = [f"{k}.png" for k in range(10_000)]
    batches = folder.PhotoReader(Preparation(4, 3, (0.5,), (0.5,)), 8).batches(files)
    names, pixels = next(batches)
    assert names == files[:8] and pixels.shape == (8, 4, 4, 3) and len(read) == 8
    assert len(list(batches)) == 1249 and len(read) == 10_000


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_names_that_cannot_be_printed(blob_run, photos, capsys):
    shutil.rmtree(photos / "query" / "class00")
    name = os.fsdecode(b"\xff\x1b[2J\n.png")
    os.rename(photos / "query" / "class01" / "3.png", photos / "query" / name)
    (photos / "query" / os.fsdecode(b"\xfe.png")).write_bytes(b"")
    assert predict(blob_run, photos) == 1
    out, err = capsys.readouterr()
    assert r"\udcff\x1b[2J\n.png  class" in out and r"\udcfe.png: need a readable" in err and "\x1b" not in out
    assert predict(blob_run, photos, "--csv", photos / "rows.csv") == 1
    assert (
        r"\udcff\x1b[2J\n.png" in (photos / "rows.csv").read_text() and "\x1b" not in (photos / "rows.csv").read_text()
    )
    assert predict(blob_run, photos, "--json", photos / "rows.json") == 1
    found = json.loads((photos / "rows.json").read_text())["predictions"]
    assert str(photos / "query" / name) in [row["file"] for row in found]  # as they are


@pytest.mark.parametrize("name", ["=cmd|' C calc'!A0", "@SUM(1+1)", "+1", "\t=1", "＝1"])
def test_names_are_no_formulas(blob_run, photos, monkeypatch, name):
    os.rename(photos / "support" / "class00", photos / "support" / name)
    (photos / "here").mkdir()
    shutil.copy(photos / "query" / "class01" / "3.png", photos / "here" / f"{name}.png")
    monkeypatch.chdir(photos / "here")
    assert predict(blob_run, photos, "--csv", photos / "rows.csv", query=[f"{name}.png"]) == 0
    with open(photos / "rows.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["file"] == f"'{name}.png".replace("\t", r"\t")
    assert not any(value.startswith(("=", "+", "-", "@", "\t", "＝")) for value in row.values())


def test_links_to_folders_are_not_followed(photos):
    os.symlink(photos / "query", photos / "query" / "again", target_is_directory=True)
    assert len(folder.query_files([photos / "query"])) == 12


def test_without_a_model_the_one_in_the_package_answers(photos, capsys):
    words = ["predict", "--support", photos / "support", "--query", photos / "query", "--device", "cpu", "--json"]
    assert main(list(map(str, words))) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["model"] is None and document["calibrated"] and document["right"] == 12
    assert set(document["predictions"][0]) == {"file", "class", "probability", "nearest"}


class Pixels(nn.Module):
    """An encoder that the command line names."""

    preparation = Preparation(4, 3, (0.5,), (0.5,))

    def __init__(self, in_channels):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(in_channels, 1, 1))

    def forward(self, x):
        return (self.scale * x).flatten(1)


def test_encoders_by_name(photos, capsys):
    torch.save({"scale": torch.full((3, 1, 1), 2.0)}, photos / "a.pt")
    for more in ([], ["--weights", photos / "a.pt"]):
        assert predict(f"{__name__}:Pixels", photos, "--json", *more) == 0
        assert json.loads(capsys.readouterr().out)["right"] == 12
    for model, message in (
        ("torchvision:resnet0", "need a name of torchvision's"),
        ("no_such:Thing", "cannot load --backbone no_such:Thing"),
        (photos / "support", "weights and image_size belong to"),
    ):
        assert predict(model, photos, "--image-size", "32") == 2
        assert message in capsys.readouterr().err


def test_embeddings_as_a_file(photos, capsys):
    (photos / "query" / "class01" / "3.png").write_bytes(b"no image")
    out = photos / "new" / "features.safetensors"
    assert main(["embed", str(photos / "query"), str(out), "--device", "cpu", "--batch-size", "5"]) == 1
    tensors, info = load_tensors(out)
    assert tensors["features"].shape == (11, 256) and len(info["files"]) == 11
    assert info["labels"] == [os.path.basename(os.path.dirname(file)) for file in info["files"]]
    expected = FewShotClassifier(device="cpu").fit(info["files"], info["labels"]).transform(info["files"])
    np.testing.assert_allclose(tensors["features"], expected, rtol=1e-4, atol=1e-5)
    assert "3.png" in capsys.readouterr().err
    assert main(["embed", str(photos / "query" / "class01" / "3.png"), str(out), "--device", "cpu"]) == 2
    assert "need an image that can be read" in capsys.readouterr().err
