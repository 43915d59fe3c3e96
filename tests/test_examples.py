"""Every example runs, as a user runs it."""

import importlib.util
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "quickstart")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path, monkeypatch, capsys):
    """In this process: PyTorch's import would be most of the time."""
    for peer in ("learn2learn", "easyfsl", "lightning"):
        if example.stem.startswith(peer) and importlib.util.find_spec(peer) is None:
            pytest.skip(f"{peer} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)  # as Python does for a script
    monkeypatch.setattr(sys, "argv", [str(example), "--smoke"])
    with warnings.catch_warnings(), torch.random.fork_rng():
        runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_quickstart_leaves_a_picture_and_shows_the_table_again(tmp_path):
    command = [sys.executable, str(FOLDER / "quickstart.py"), "--smoke"]
    tables = [subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout for _ in (1, 2)]
    assert "Episodic" in tables[0] and "20-way" in tables[0] and tables[0] == tables[1]
    out = tmp_path / "runs" / "quickstart-smoke"
    assert {"convergence.png", "episodic-4-tasks", "l2g-algorithm-1", "l2g-mix-0.5"} <= {p.name for p in out.iterdir()}
