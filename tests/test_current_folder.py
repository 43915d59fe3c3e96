"""Nothing in the current folder is imported: data, photos and runs may hold a stranger's Python files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import l2g_meta
from l2g_meta.classify.source import open_source
from l2g_meta.cli.main import main
from l2g_meta.errors import CheckpointError
from l2g_meta.files.sealed import opened
from l2g_meta.training.build import load_run

PACKAGE = Path(l2g_meta.__file__).parents[1]
NAMED = {"tqdm", "csv", "torch", "numpy", "safetensors", "PIL"}
OTHERS = {"learn2learn", "matplotlib", "torchvision", "sklearn", "filelock", "onnx", "timm", "submitit",
          "sitecustomize", "usercustomize", "cli", "commands", "files", "build", "training"}  # fmt: skip
BY_PYTHON = {"runpy"} if sys.version_info < (3, 11) else set()  # Python 3.10 itself reads it from there for -m
SLOW = (("l2g", "evaluate"), ("module", "report"), ("module", "evaluate"))  # what they import, others import too
EVIL = "with open({marker!r}, 'a') as file:\n    file.write(__file__ + chr(10))\n"


@pytest.fixture(scope="module")
def folders(blob_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], Path]:
    """A run, its data and photos, each with a file for every module that could be imported there."""
    base = tmp_path_factory.mktemp("evil")
    shutil.copytree(blob_run.parent, base / "all")
    found = {"run": base / "all" / "run", "data": base / "all" / "data", "photos": base / "all" / "data" / "train"}
    marker = base / "marker"
    for folder in found.values():
        for name in {*sys.stdlib_module_names, *NAMED, *OTHERS} - BY_PYTHON:
            (folder / f"{name}.py").write_text(EVIL.format(marker=str(marker)))
        (folder / "matplotlibrc").write_bytes(b"text.usetex: True\n\xff")  # Matplotlib's import fails where it is read
    return found, marker


def call(how: str, folder: Path, script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command in a folder, started as a user starts it."""
    script.write_text("import sys\nfrom l2g_meta.cli.main import main\nsys.exit(main())\n")  # as pip writes l2g
    launcher = script.with_name("torchrun")
    launcher.write_text("import sys\nfrom torch.distributed.run import main\nsys.exit(main())\n")
    torchrun = [str(launcher), "--standalone", "--nproc-per-node", "1"]
    how_to = {"l2g": [str(script)], "module": ["-m", "l2g_meta"], "torchrun": [*torchrun, "-m", "l2g_meta"]}
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    environment.pop("PYTHONSAFEPATH", None)
    return subprocess.run([sys.executable, *how_to[how], *words], cwd=folder, env=environment, text=True,
                          capture_output=True, check=False, timeout=300)  # fmt: skip


@pytest.mark.parametrize(
    ("how", "command"),
    [
        ("l2g", "report"),
        ("l2g", "predict"),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in SLOW),
        ("module", "train"),  # which draws a curve, and so imports Matplotlib
        ("torchrun", "evaluate"),
    ],
)
def test_nothing_in_the_current_folder_runs(how, command, folders, tmp_path):
    found, marker = folders
    data = str(found["data"])
    there, words = {
        "report": ("run", ["report", ".", "--root", data, "--episodes", "2", "-o", str(tmp_path / "report.html")]),
        "predict": ("photos", ["predict", "--model", str(found["run"]), "--support", ".", "--query", "."]),
        "train": ("run", ["train", "--resume", "."]),
        "evaluate": ("data", ["evaluate", str(found["run"]), "--root", ".", "--episodes", "2"]),
    }[command]
    done = call(how, found[there], tmp_path / "script", *words)
    assert done.returncode == 0, done.stderr
    assert not marker.exists(), marker.read_text()


@pytest.mark.parametrize(("how", "entries"), [("l2g", ":{package}"), ("module", "{package}:.")])
def test_an_empty_entry_of_pythonpath(how, entries, tmp_path, monkeypatch):
    """What Python itself imports before any command is its own; this is of what commands import."""
    for name in (*NAMED - {"csv"}, *OTHERS - {"sitecustomize", "usercustomize"}):
        (tmp_path / f"{name}.py").write_text(EVIL.format(marker=str(tmp_path / "marker")))
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", entries.format(package=PACKAGE).replace(":", os.pathsep))
    (tmp_path / "elsewhere").mkdir()
    done = call(how, tmp_path, tmp_path / "elsewhere" / "script", "evaluate", "nowhere")
    assert done.returncode == 2 and "nowhere" in done.stderr, done.stderr
    assert not (tmp_path / "marker").exists()


def test_the_files_would_run_if_they_were_imported(folders):
    found, marker = folders
    subprocess.run([sys.executable, "-c", "import tqdm"], cwd=found["run"], check=True,
                   env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"})  # fmt: skip
    assert str(found["run"]) in marker.read_text()
    marker.unlink()


STARTS = """\
import multiprocessing
import sys
from contextlib import suppress
from l2g_meta.cli.main import main
if __name__ == "__main__":
    sys.argv[1:] = ["--version"]
    with suppress(SystemExit):
        main()
    process = multiprocessing.get_context("spawn").Process(target=print)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


def test_processes_that_a_command_starts(folders, tmp_path):
    """As `l2g bench` starts them to measure memory."""
    if sys.version_info < (3, 11):
        pytest.skip("Python 3.10 has no PYTHONSAFEPATH")
    found, marker = folders
    script = tmp_path / "script"
    script.write_text(STARTS)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | {"PYTHONPATH": str(PACKAGE)}
    done = subprocess.run([sys.executable, str(script)], cwd=found["run"], env=environment, check=False)
    assert done.returncode == 0 and not marker.exists()


MINE = """\
from l2g_meta.models.heads import PrototypicalHead
with open({marker!r}, 'a') as file:
    file.write('imported')
class Head(PrototypicalHead):
    pass
"""


@pytest.fixture
def named(blob_run: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run that names a module in its config and states, in a folder that has it; what that writes."""
    shutil.copytree(blob_run, tmp_path / "run")
    (tmp_path / "evil_head.py").write_text(MINE.format(marker=str(tmp_path / "marker")))
    from l2g_meta.files.tensors import load_tensors, save_tensors

    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps({**opened(json.loads(path.read_text())), "head": "evil_head:Head"}))
    for path in (tmp_path / "run").glob("*.safetensors"):
        tensors, info = load_tensors(path)
        info["config"] |= {"head": "evil_head:Head"}
        save_tensors(path, tensors, info)
    yield tmp_path / "run", tmp_path / "marker"
    sys.modules.pop("evil_head", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


def words_of(run: Path) -> list[list[str]]:
    data = str(run.parent / "data")
    return [
        ["evaluate", str(run), "--episodes", "2"],
        ["export", str(run), str(run.parent / "model"), "--episodes", "2"],
        ["report", str(run), "--episodes", "2", "-o", str(run.parent / "report.html")],
        ["predict", "--model", str(run), "--support", data, "--query", data],
        ["train", "--resume", str(run)],
        ["train", "--resume", str(run), "--backbone", "conv4"],
    ]


def test_a_module_that_is_stored_needs_trust(named, blob_run, monkeypatch, capsys):
    run, marker = named
    shutil.copytree(blob_run.parent / "data" / "test", run.parent / "data")
    monkeypatch.chdir(run.parent)
    for words in words_of(run):
        assert main(words) == (1 if words[0] == "report" else 2)
        error = capsys.readouterr().err
        assert "evil_head:Head, which would be run; look at it, then give --trust" in error, words
    for function in (load_run, open_source):
        with pytest.raises(CheckpointError, match=r"trust=True in Python"):
            function(run)
    assert not marker.exists()
    for words in words_of(run):
        sys.modules.pop("evil_head", None)
        marker.unlink(missing_ok=True)
        assert main([*words, "--trust"]) == 0, words
        assert marker.exists()
    assert main(["predict", *words_of(run)[3][1:], "--model", str(run.parent / "model")]) == 2
    assert "names a module" in capsys.readouterr().err


def test_the_command_may_name_it_itself(named, monkeypatch):
    run, marker = named
    monkeypatch.chdir(run.parent)
    assert main(["train", "--resume", str(run), "--head", "evil_head:Head"]) == 0
    assert marker.exists() and sys.path[-1] == str(run.parent)


def test_what_is_installed_comes_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "safetensors.py").write_text(EVIL.format(marker=str(tmp_path / "marker")))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--head", "safetensors:safe_open", "--out", "x"]) == 2
    assert not (tmp_path / "marker").exists() and "need a class derived from" in capsys.readouterr().err


def test_libraries_need_no_trust(blob_run, tmp_path):
    from l2g_meta.training.build import refuse_modules
    from l2g_meta.training.config import Config

    refuse_modules(Config(backbone="timm:resnet10t").resolved(), tmp_path)
    with pytest.raises(CheckpointError, match="names a module as its head"):
        refuse_modules(Config(head="timm:Head").resolved(), tmp_path)
