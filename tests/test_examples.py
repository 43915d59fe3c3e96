"""Every example runs, as a user runs it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "quickstart")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path):
    for peer in ("learn2learn", "easyfsl", "lightning"):
        if example.stem.startswith(peer) and importlib.util.find_spec(peer) is None:
            pytest.skip(f"{peer} is not installed")
    done = subprocess.run(
        [sys.executable, str(example), "--smoke"], cwd=tmp_path, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


def test_quickstart_leaves_pictures_and_shows_the_table_again(tmp_path):
    command = [sys.executable, str(FOLDER / "quickstart.py"), "--smoke"]
    tables = [subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout for _ in (1, 2)]
    assert "Episodic" in tables[0] and "20-way" in tables[0] and tables[0] == tables[1]
    out = tmp_path / "runs" / "quickstart-smoke"
    assert {"convergence.png", "tsne.png", "episodic-4-tasks", "l2g-algorithm-1", "l2g-mix-0.5"} <= {
        p.name for p in out.iterdir()
    }
