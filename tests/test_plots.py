import pytest
from PIL import Image

from l2g_meta.errors import L2GError
from l2g_meta.training.curves import learning_curve
from l2g_meta.training.log import COLUMNS


def write_log(run, iterations, *, every):
    run.mkdir()
    lines = [",".join(COLUMNS)]
    for k in range(1, iterations + 1):
        done = k % every == 0
        lines.append(f"{k},{1 / k},,,0.001,4,0.1,0,{40 + k if done else ''},{2.0 if done else ''},,")
    (run / "log.csv").write_text("\n".join(lines) + "\n")
    return run


def test_learning_curves_of_several_runs(tmp_path):
    runs = [write_log(tmp_path / name, n, every=5) for name, n in (("a", 20), ("b", 120))]
    path = learning_curve(runs, tmp_path / "curve.png", labels=["A", "B"])
    with Image.open(path) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1_000_000)}
        assert image.width > 1000 and {(31, 119, 180), (255, 127, 14)} <= colours  # both lines are drawn


@pytest.mark.parametrize("name", ["a\udcff", "$\\nothing$", "_hidden", "line\nbreak"], ids=repr)
def test_a_run_of_any_name(name, tmp_path, recwarn):
    learning_curve([write_log(tmp_path / name, 10, every=5)], tmp_path / "curve.png")
    assert not recwarn.list and (tmp_path / "curve.png").stat().st_size > 10_000


def test_a_run_without_a_log_is_named(tmp_path):
    with pytest.raises(L2GError, match="need a run's log in .*nothing.*log.csv"):
        learning_curve([tmp_path / "nothing"], tmp_path / "curve.png")
