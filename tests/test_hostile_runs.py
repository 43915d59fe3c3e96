"""Runs, models and photos of a stranger's, or damaged: each ends in a result, or in one line that names the file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from l2g_meta.classify import exported as exporting
from l2g_meta.classify.photos import Preparation, inputs
from l2g_meta.cli.main import main
from l2g_meta.cli.output import plain_warnings
from l2g_meta.data.images import read_image
from l2g_meta.errors import DataError, L2GError
from l2g_meta.files.sealed import opened
from l2g_meta.training.config import Config
from l2g_meta.training.log import _rows_until, read_log

PREPARATION = Preparation(8, 3, (0.5,), (0.5,))


@pytest.fixture
def run(blob_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(blob_run, tmp_path / "run")


@pytest.fixture
def patience() -> Iterator[None]:
    """Ends a test that waits for ever."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class TestLog:
    def test_every_bit(self, run):
        """Each bit of a log, one at a time: its row is dropped, or it is the same."""
        content = (run / "log.csv").read_bytes()
        sound = read_log(run)
        for bit in range(8 * len(content)):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            (run / "log.csv").write_bytes(changed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for rows in (read_log(run), _rows_until(run, 2)):
                    assert all(row in sound for row in rows) and len(rows) >= len(sound) - 2

    def test_rows_of_versions_without_checksums(self, run):
        lines = (run / "log.csv").read_text().splitlines()
        (run / "log.csv").write_text("".join(line.rpartition(",")[0] + "\n" for line in lines))
        assert [(row["iteration"], row["crc32"]) for row in read_log(run)] == [("1", ""), ("2", "")]

    @pytest.mark.parametrize("damage", ["\0", "x", "_", "é", '"'])
    def test_a_damaged_number_costs_its_row(self, damage, run, capsys):
        lines = (run / "log.csv").read_text(encoding="utf-8").splitlines()
        cells = lines[1].split(",")
        cells[1] = cells[1][:3] + damage + cells[1][3:]
        (run / "log.csv").write_text("\r\n".join([lines[0], ",".join(cells), lines[2], ""]), encoding="utf-8")
        with pytest.warns(UserWarning, match="1 damaged rows are left out"):
            assert main(["export", str(run), str(run.parent / "model"), "--episodes", "2"]) == 0
        with pytest.warns(UserWarning, match="lacks 1 of the 2 updates before this one"):
            assert main(["train", "--resume", str(run), "--iterations", "3", "--force", "--quiet"]) == 0
        assert [row["iteration"] for row in read_log(run)] == ["2", "3"]


class TestSettings:
    def test_a_value_changed_by_hand(self, run):
        path = run / "config.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "lr": 0.5}))
        with pytest.raises(L2GError, match='do not fit their checksum; if you changed them, remove the line "sha256"'):
            Config.load(path)
        path.write_text(json.dumps({name: v for name, v in values.items() if name != "sha256"} | {"lr": 0.5}))
        assert Config.load(path).lr == 0.5


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
class TestPipes:
    @pytest.mark.parametrize("name", ["config.json", "log.csv", "best.safetensors", "resume-2.safetensors"])
    def test_of_a_run(self, name, run, patience, capsys):
        (run / name).unlink()
        os.mkfifo(run / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for words in (
                ["train", "--resume", str(run), "--quiet"],
                ["evaluate", str(run), "--episodes", "2"],
                ["report", str(run), "--episodes", "2", "-o", str(run.parent / "report.html")],
                ["train", "--weights", str(run / name), "--out", str(run.parent / "new"), "--iterations", "1"],
            ):
                assert main(words) in (0, 1, 2)
        assert "Traceback" not in capsys.readouterr().err

    def test_of_a_model_and_of_photos(self, run, patience, capsys):
        data = run.parent / "photos"
        shutil.copytree(json.loads((run / "config.json").read_text())["root"] + "/test", data)
        os.mkfifo(data / "class00" / "pipe.png")
        words = ["predict", "--model", str(run), "--support", str(data), "--query", str(data)]
        assert main(words) == 1
        assert "pipe.png" in capsys.readouterr().err
        (run.parent / "model").mkdir()
        os.mkfifo(run.parent / "model" / "model.json")
        assert main([*words, "--model", str(run.parent / "model")]) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_classes_whose_names_are_no_text(run, capsys):
    config = json.loads((run / "config.json").read_text())
    data, name = run.parent / "data", os.fsdecode(b"caf\xe9\x1b[2J")
    shutil.copytree(config["root"], data)
    for split in ("train", "test"):
        (data / split / "class00").rename(data / split / name)
    model = run.parent / "model"
    assert main(["export", str(run), str(model), "--episodes", "2", "--root", str(data)]) == 0
    assert name in json.loads((model / "model.json").read_text())["classes"]
    card = (model / "README.md").read_text(encoding="utf-8")
    assert r"caf\udce9\x1b\[2J" in card and "\x1b" not in card
    photos = str(data / "test")
    assert (
        main(["predict", "--model", str(model), "--support", photos, "--query", photos, "--csv", str(data / "a.csv")])
        == 0
    )
    page = run.parent / "report.html"
    assert main(["report", str(run), "--root", str(data), "--episodes", "20", "-o", str(page)]) == 0
    assert "\x1b" not in page.read_text(encoding="utf-8")


class TestExports:
    def test_the_next_one_removes_what_was_left(self, run, monkeypatch):
        out = run.parent / "a[b]"
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(exporting, "write_text", lambda *_: sys.exit("killed"))
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # nobody is left to do so
            exporting.export(run, out, episodes=2)
        (run.parent / ".a[b].mine").mkdir()
        assert len(list(run.parent.glob(".a*"))) == 2 and not out.exists()
        exporting.export(run, out, episodes=2)
        assert [path.name for path in run.parent.glob(".a*")] == [".a[b].mine"] and out.is_dir()

    def test_one_at_a_time(self, tmp_path):
        with exporting._appears(tmp_path / "model"):
            with (
                pytest.raises(exporting.L2GError, match="another process exports"),
                exporting._appears(tmp_path / "model"),
            ):
                pass
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 10**30), ("seed", None), ("backbone", ""), ("inner_lr", 10**400)]
)
def test_a_config_with_an_absurd_value(name, value, run, capsys):
    values = opened(json.loads((run / "config.json").read_text()))
    (run / "config.json").write_text(json.dumps({**values, name: value}))
    assert main(["evaluate", str(run), "--episodes", "2"]) == 2
    err = capsys.readouterr().err
    assert "--" + name.replace("_", "-") in err and "Traceback" not in err
    assert str(run) in err


@pytest.mark.parametrize("how", [["--resume", "RUN"], ["--out", "RUN", "--resume"]], ids=" ".join)
def test_a_config_nested_without_end(how, run, capsys):
    (run / "config.json").write_text('{"x":' + 100_000 * "[" + 100_000 * "]" + "}", encoding="utf-8")
    code = main(["train", *(str(run) if word == "RUN" else word for word in how)])
    err = capsys.readouterr().err
    assert code in (0, 2) and "config.json" in err and "Traceback" not in err


def test_warnings_do_not_steer_the_terminal(run, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    plain_warnings()
    shutil.move(run, other := run.parent / "a\x1b[2J")
    with open(other / "log.csv", "a") as log:
        log.write("damaged,\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_log(other)
    (warning,) = caught
    line = warnings.formatwarning(warning.message, UserWarning, read_log.__code__.co_filename, 1)
    assert line.startswith("l2g: warning: ") and r"a\x1b[2J" in line and "\x1b" not in line


def deep_png(colour: int, channels: int, depth: int = 16) -> bytes:
    """A PNG of 8 by 8 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes(range(8 * channels * depth // 8)) for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_images_of_16_bits_are_refused_whatever_their_colours(colour, channels, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(deep_png(colour, channels))
    with pytest.raises(DataError, match="more than 8 bits per channel.*convert it to 8 bits"):
        read_image(str(path))
    with Image.open(path) as image, pytest.raises(DataError, match="need 8-bit images"):
        inputs([image], PREPARATION, device=torch.device("cpu"), dtype=torch.float32)
    path.write_bytes(deep_png(colour, channels, 8))
    assert np.asarray(read_image(str(path))).shape == (8, 8, 3)


def test_a_run_under_another_default_type(run, capsys):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    torch.set_default_dtype(torch.float64)
    try:
        for words in (["train", "--resume", str(run), "--iterations", "3", "--force"], ["evaluate", str(run)]):
            assert main(words) == 2
            error = capsys.readouterr().err
            assert "is torch.float32 there and torch.float64 here; call torch.set_default_dtype" in error, error
    finally:
        torch.set_default_dtype(torch.float32)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_without_a_terminal_there_is_a_line_for_each_validation(run, capsys):
    words = ["train", "--resume", str(run), "--iterations", "6", "--force"]
    assert main(words) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "validation" in line]
    assert [line.partition(": loss ")[0] for line in lines] == [f"{run}: update {k} of 6" for k in (4, 6)]
    assert main([*words[:4], "8", "--force", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
