"""Files are written new, whole and through no link; locks touch nothing elsewhere; only regular files are read."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from l2g_meta.cli.main import main
from l2g_meta.errors import CheckpointError
from l2g_meta.files.locks import claim
from l2g_meta.files.reading import open_regular, read_text
from l2g_meta.files.writing import check_writable, new_file, open_to_append, remove_partial, write_text
from l2g_meta.training.curves import save, subplots

TEXT = "what the user has elsewhere\n"
LINKS = pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="needs links")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere.txt"
    path.write_text(TEXT)
    return path


@LINKS
class TestLinks:
    def test_a_link_is_replaced_not_followed(self, elsewhere, tmp_path):
        link = tmp_path / "a.json"
        link.symlink_to(elsewhere)
        write_text(link, "new")
        assert elsewhere.read_text() == TEXT and not link.is_symlink() and link.read_text() == "new"

    def test_so_is_one_under_the_name_of_the_file_beside_it(self, elsewhere, tmp_path, monkeypatch):
        monkeypatch.setattr(secrets, "token_hex", lambda n: "guessed")
        (tmp_path / ".l2g-guessed").symlink_to(elsewhere)
        with pytest.raises(CheckpointError, match=r"cannot write .*a\.json: File exists"):
            write_text(tmp_path / "a.json", "new")
        assert elsewhere.read_text() == TEXT and not (tmp_path / "a.json").exists()

    def test_every_file_of_a_run_folder(self, elsewhere, blob_run, tmp_path):
        """Links for all the files that resuming, testing and exporting a run write, by any name that can be guessed."""
        run = tmp_path / "run"
        shutil.copytree(blob_run, run)
        names = [path.name for path in run.iterdir()]
        names += ["resume-4.safetensors", "job.json"]
        pids = range(os.getpid() - 3, os.getpid() + 3)
        links = [run / f".{name}{end}" for name in names for end in ("", ".tmp", *(f".{pid}" for pid in pids))]
        (run / "curve.png").unlink()
        links += [run / "curve.png", run / "resume-4.safetensors", run / "report.html", run / "out.json"]
        for link in set(links):
            link.symlink_to(elsewhere)
        with pytest.warns(UserWarning, match="resume-4.* going on from resume-2"):
            assert main(["train", "--resume", str(run), "--iterations", "4", "--force", "--quiet"]) == 0
        assert main(["report", str(run), "-o", str(run / "report.html"), "--episodes", "2", "--json",
                     str(run / "out.json")]) == 0  # fmt: skip
        assert elsewhere.read_text() == TEXT
        assert json.loads((run / "out.json").read_text())["problems"] == []

    @pytest.mark.parametrize("kind", ["symbolic", "nowhere", "hard", "folder", "pipe"])
    def test_a_lock_that_is_none(self, kind, elsewhere, blob_run, tmp_path, capsys):
        run = tmp_path / "run"
        shutil.copytree(blob_run, run)
        (run / ".lock").unlink(missing_ok=True)
        target = tmp_path / "not there" if kind == "nowhere" else elsewhere
        if kind == "hard":
            os.link(elsewhere, run / ".lock")
        elif kind == "folder":
            (run / ".lock").mkdir()
        elif kind == "pipe":
            os.mkfifo(run / ".lock")
        else:
            (run / ".lock").symlink_to(target)
        assert main(["train", "--resume", str(run), "--iterations", "4", "--force", "--quiet"]) == 2
        error = capsys.readouterr().err
        assert f"need to lock {run / '.lock'}, got: it is a link or no regular file" in error and error.count("\n") == 1
        assert elsewhere.read_text() == TEXT and not (tmp_path / "not there").exists()

    def test_a_log_that_became_one_is_not_gone_on_with(self, elsewhere, tmp_path):
        (tmp_path / "log.csv").symlink_to(elsewhere)
        with pytest.raises(OSError, match="symbolic links"):
            open_to_append(tmp_path / "log.csv")


class TestWriting:
    def test_what_was_there_stays_until_all_is_written(self, elsewhere):
        with pytest.raises(ZeroDivisionError), new_file(elsewhere) as file:
            file.write(b"half")
            file.flush()
            assert elsewhere.read_text() == TEXT
            1 / 0  # noqa: B018
        assert elsewhere.read_text() == TEXT and [p.name for p in elsewhere.parent.iterdir()] == [elsewhere.name]

    def test_a_file_is_on_the_disk_before_its_name(self, tmp_path, monkeypatch):
        done, sync, rename = [], os.fsync, os.replace

        def kind(descriptor):
            done.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", kind)
        monkeypatch.setattr(os, "replace", lambda a, b: done.append("name") or rename(a, b))
        write_text(tmp_path / "a", "x")
        assert done == ["file", "name", "folder"]

    @pytest.mark.parametrize("path", ["/dev/null", "folder"])
    def test_what_is_no_file_is_not_replaced(self, path, tmp_path):
        (tmp_path / "folder").mkdir()
        with pytest.raises(CheckpointError, match="no regular file"):
            write_text(tmp_path / path, "x")
        with pytest.raises(OSError, match="no regular file"):
            check_writable(tmp_path / path)
        assert not Path("/dev/null").is_file()

    @pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
    def test_a_link_to_the_standard_output_stays(self, tmp_path):
        """That may be a file, which is not the link's to be replaced by."""
        with open(tmp_path / "out", "w") as out:
            (tmp_path / "link").symlink_to(f"/proc/self/fd/{out.fileno()}")
            (tmp_path / "far").symlink_to("link")
            for name in ("link", "far"):
                with pytest.raises(CheckpointError, match="no regular file"):
                    write_text(tmp_path / name, "x")
            with pytest.raises(CheckpointError, match="no regular file"):
                write_text(Path(f"/dev/fd/{out.fileno()}"), "x")
        assert (tmp_path / "link").is_symlink()

    def test_what_was_left_is_removed(self, tmp_path):
        (tmp_path / ".l2g-0123").write_text("left")
        (tmp_path / ".l2g-mine").mkdir()
        (tmp_path / "kept").write_text("")
        remove_partial(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".l2g-mine", "kept"]

    def test_pictures(self, elsewhere, tmp_path):
        figure, _ = subplots(1, 1)
        (tmp_path / "a.png").symlink_to(elsewhere)
        save(figure, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and elsewhere.read_text() == TEXT
        assert save(figure, tmp_path / "a.svg").read_text().startswith("<?xml")

    def test_rows_of_predict_replace_the_old_ones_at_the_end(self, blob_run, tmp_path, elsewhere):
        """A process that is killed while it writes rows leaves the old file."""
        data = blob_run.parent / "data"
        code = "import os, sys\nfrom l2g_meta.cli.main import main\nfrom l2g_meta.classify import predictions\n"
        code += "real = predictions.classify_files\n"
        code += "def killed(*a):\n  for batch in real(*a):\n    yield batch\n    os.kill(os.getpid(), 9)\n"
        code += "predictions.classify_files = killed\nmain(sys.argv[1:])\n"
        words = ["predict", "--model", blob_run, "--support", data / "train", "--query", data / "test"]
        words += ["--csv", elsewhere, "--batch-size", "4", "--quiet"]
        done = subprocess.run([sys.executable, "-c", code, *map(str, words)], check=False)
        assert done.returncode == -9 and elsewhere.read_text() == TEXT


class TestReading:
    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
    def test_a_pipe_keeps_nobody_waiting(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match="no regular file"):
            open_regular(tmp_path / "pipe")

    def test_a_large_text_is_refused(self, tmp_path):
        with open(tmp_path / "large", "wb") as file:
            file.truncate(2**40)
        with pytest.raises(OSError, match="1099511627776 bytes, more than"):
            read_text(tmp_path / "large")


def test_a_claim_that_was_removed_meanwhile_is_none(tmp_path):
    with claim(tmp_path / "lock", remove=True) as ours:
        assert ours
    assert not (tmp_path / "lock").exists()
