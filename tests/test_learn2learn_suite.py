"""learn2learn's own unit tests, with our clone and update in place of theirs.

    python -m pytest -m slow tests/test_learn2learn_suite.py

The tests are in learn2learn's source distribution, which pip downloads; nothing of it is kept here.
"""

import re
import subprocess
import sys
import tarfile

import pytest

TESTS = ("algorithms/maml_test.py", "algorithms/metasgd_test.py", "algorithms/gbml_test.py", "utils_test.py")

OURS = '''
import sys

import learn2learn
from torch import nn

from l2g_meta.inner import clone as ours

theirs = {name: getattr(learn2learn.utils, name) for name in ("clone_module", "update_module")}
calls = dict.fromkeys(theirs, 0)


def clone_module(module, memo=None):
    """Ours; what is no module is returned as it is, as learn2learn does."""
    calls["clone_module"] += 1
    return ours.clone_module(module) if isinstance(module, nn.Module) else module


def update_module(module, updates=None, memo=None):
    """Ours; without updates they are attributes of the parameters, learn2learn's way to hand them over."""
    calls["update_module"] += 1
    if updates is None:
        updates = [getattr(p, "update", None) for p in module.parameters()]
    return ours.update_module(module, list(updates))


for place in [m for name, m in sys.modules.items() if name.split(".")[0] == "learn2learn"]:
    for name, original in theirs.items():
        if getattr(place, name, None) is original:
            setattr(place, name, globals()[name])


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"ours called: {calls['clone_module']} clones, {calls['update_module']} updates")
'''


@pytest.mark.slow
def test_learn2learns_own_tests_pass_with_our_clone_and_update(tmp_path):
    pytest.importorskip("learn2learn")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
    pip += ["--no-binary=learn2learn", "--dest", tmp_path, "learn2learn==0.2.0"]
    downloaded = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    if downloaded.returncode:
        pytest.skip(f"pip cannot download learn2learn's source: {downloaded.stderr.strip()[-200:]}")
    with tarfile.open(tmp_path / "learn2learn-0.2.0.tar.gz") as archive:
        for test in TESTS:
            member = archive.extractfile(f"learn2learn-0.2.0/tests/unit/{test}")
            (tmp_path / test.replace("/", "_")).write_bytes(member.read())
    (tmp_path / "conftest.py").write_text(OURS, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, "--no-header"]
    command += sorted(tmp_path.glob("*_test.py"))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert re.search(r"\b28 passed", done.stdout) and done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    clones, updates = map(int, re.search(r"ours called: (\d+) clones, (\d+) updates", done.stdout).groups())
    assert clones > 20 and updates > 20
