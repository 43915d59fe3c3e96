import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from l2g_meta.cli.main import main
from l2g_meta.errors import CheckpointError, L2GError
from l2g_meta.files.locks import claim
from l2g_meta.files.sealed import opened
from l2g_meta.models.functional import confidence_interval
from l2g_meta.paper import published
from l2g_meta.paper.cells import run_cell, work
from l2g_meta.paper.equal_time import equal_time
from l2g_meta.paper.plan import EPISODES, HALVE_EVERY, SCALES, Cell, plan
from l2g_meta.paper.published import COLUMNS
from l2g_meta.paper.study import EXPERIMENTS, ROWS, STUDIES
from l2g_meta.paper.tables import curve, difference, markdown, tables, write_tables
from l2g_meta.training import update as updates
from l2g_meta.training.build import load_run
from l2g_meta.training.log import read_log
from l2g_meta.training.loop import learning_rate
from l2g_meta.training.update import Updater


def smoke(out, *rows, seeds=1, experiment="table1"):
    return plan(experiment, "smoke", out, rows=rows or None, seeds=seeds, device="cpu")


def everything(scale="full", experiments=published.EXPERIMENTS):
    return [cell for name in experiments for cell in plan(name, scale, Path("none"), root="data").cells]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Three rows, two seeds, trained and tested."""
    what = smoke(tmp_path_factory.mktemp("reproduce"), "proto", "proto-tasks", "l2g-proto", seeds=2)
    assert work(what.cells, quiet=True) == []
    return what


@pytest.fixture
def tiny(monkeypatch):
    """Smaller images and fewer queries at smoke scale."""
    scale = replace(SCALES["smoke"], image_size=16, queries=2, test_queries=1, test_episodes=2)
    monkeypatch.setitem(SCALES, "smoke", scale)


def test_the_published_numbers_have_a_row_and_a_column():
    for name, spec in EXPERIMENTS.items():
        assert set(spec.rows) | set(spec.paper) <= set(ROWS) and set(spec.columns) <= set(COLUMNS), name
        assert all(len(numbers) == len(spec.columns) for numbers in spec.paper.values()), name
    assert all(other in ROWS for row in ROWS.values() for other in row.against)
    # Spot checks against the paper's text.
    assert EXPERIMENTS["table1"].paper["l2g-proto"][0] == 50.20 and EXPERIMENTS["table2"].paper["proto"][3] == 57.83
    assert "maml-relation" in EXPERIMENTS["table2"].rows and "maml-relation" not in EXPERIMENTS["table2"].paper
    assert EXPERIMENTS["table3"].paper["l2g-proto-fixed"] == (60.64, 58.08, 53.00)


def test_studies_can_be_run_and_a_screen_has_at_most_40_cells():
    own = {"spread": ("spread", 600), "length": ("long", 8000)}  # scales
    screened = {name: study for name, study in STUDIES.items() if name not in (*own, "finetune")}
    for name, (scale, length) in own.items():
        configs = [cell.config() for cell in everything(scale, {name: STUDIES[name]})]
        assert {(c.iterations, c.image_size, c.pairs, c.average) for c in configs if c.method == "l2g"} == {
            (length, 28, 2, True)
        }
    cells = set()
    for cell in everything("screen", screened):
        config = cell.config()
        assert config.image_size == 28 and config.pairs == ROWS[cell.row].options.get("pairs", 2) and cell.seed == 0
        assert config.iterations == 200 and cell.row in STUDIES[cell.plan.experiment].rows
        cells.add(cell.folder)
    assert len(cells) <= 40 and len({c.seed for c in everything("confirm", screened)}) == 3


@pytest.mark.parametrize("scale", ["full", "small"])
def test_every_cell_has_a_config_that_can_be_run(scale):
    configs = {cell: cell.config() for cell in everything(scale)}
    for cell, config in configs.items():
        row, column = ROWS[cell.row], COLUMNS[cell.column]
        shape = config.outer_ways, config.outer_shots
        assert shape == tuple(v[0] if len(v) == 1 else v for v in (column.ways, column.shots))
        if scale == "full":
            assert config.image_size == 84 and config.queries == 15
            assert config.iterations * config.episodes_per_update == EPISODES[row.family]
            assert config.lr_halve_every == HALVE_EVERY[row.family]
        else:
            assert config.iterations <= 400 and cell.column in ("5w1s", "any-shot")
    table3 = next(c for cell, c in configs.items() if cell.row == "l2g-proto-fixed")
    assert (table3.ways, table3.shots, table3.outer_shots) == (5, 5, (1, 5, 10))


def test_base_rows_have_one_task_per_update_fair_ones_as_many_as_l2g_with_its_schedule():
    by_row = {cell.row: cell.config() for cell in everything() if cell.column == "5w1s"}
    assert by_row["proto"].tasks_of_an_update == by_row["relation"].tasks_of_an_update == 1
    assert by_row["proto-tasks"].tasks_of_an_update == by_row["l2g-proto"].tasks_of_an_update == 10
    assert by_row["proto-time"].tasks_of_an_update == by_row["relation-time"].tasks_of_an_update == 10
    assert by_row["maml-proto"].tasks_of_an_update == 5  # inner and outer loss on one task
    for k in (0, 1999, 2000, 19_999):
        assert learning_rate(by_row["proto-tasks"], k) == learning_rate(by_row["l2g-proto"], k)
    assert by_row["maml"].inner_steps == 5
    assert by_row["l2g-proto-meta-sgd"].learn_inner_lr == "element" and by_row["l2g-proto"].inner_lr == 0.01


def test_tables_hold_what_the_cells_found(done):
    values = tables(done)
    (part,) = values["tables"]
    l2g = next(row for row in part["rows"] if row["row"] == "l2g-proto")
    results = [json.loads((cell.folder / "test.json").read_text()) for cell in done.cells if cell.row == "l2g-proto"]
    means = [np.mean(result["tests"]["running"]["accuracies"]) for result in results]
    assert l2g["running"]["accuracy_mean"] == pytest.approx(np.mean(means))
    assert l2g["running"]["ci95_runs"] == pytest.approx(confidence_interval(means))
    assert l2g["tasks"] == [20, 20] and l2g["updates"] == [2, 2] and min(l2g["seconds"]) > 0
    base = next(row for row in part["rows"] if row["row"] == "proto-tasks")
    gap = l2g["running"]["accuracy_mean"] - base["running"]["accuracy_mean"]
    assert l2g["against"]["proto-tasks"]["running"]["mean"] == pytest.approx(gap)
    assert values["missing"] == [] and l2g["paper"] is None  # glyphs are not in the paper
    text = markdown(values)
    assert text.count("| L2G + Prototypical |") == 3 and "its numbers mean nothing" in text
    assert f"**{l2g['running']['accuracy_mean']:.2f} ± " in text
    gain = l2g["against"]["proto-tasks"]["running"]
    assert f"{gain['mean']:+.2f} ± {gain['ci95_episodes']:.2f} [± {gain['ci95_runs']:.2f}]" in text
    assert "In brackets ± is 95 % over seeds (Student t)" in text


def test_the_curves_are_the_logs_at_their_validations(done):
    cell = done.cells[0]
    (line,) = curve(cell)
    log = read_log(cell.folder)
    assert line["updates"] == "2" and line["val_accuracy"] == f"{float(log[-1]['val_accuracy']):.4f}"
    assert float(line["loss"]) == pytest.approx(np.mean([float(row["loss"]) for row in log]), abs=1e-4)
    assert float(line["seconds"]) == pytest.approx(sum(float(row["seconds"]) for row in log), abs=0.06)


def test_differences_are_paired():
    def result(seed, *accuracies):
        return {"config": {"seed": seed}, "tests": {"running": {"accuracies": list(accuracies)}}}

    a = [result(0, 40, 60, 50, 70), result(1, 50, 60, 50, 60)]
    b = [result(0, 38, 58, 49, 67), result(1, 50, 57, 48, 60)]
    found = difference(a, b, "running")
    gains = np.array([[2, 2, 1, 3], [0, 3, 2, 0]], dtype=float)
    assert found["mean"] == gains.mean() and found["runs"] == [2.0, 1.25]
    assert found["ci95_episodes"] == pytest.approx(confidence_interval(gains.mean(0).tolist()))
    assert found["ci95_runs"] == pytest.approx(confidence_interval([2.0, 1.25]))
    assert difference(a[:1], b[:1], "running")["ci95_runs"] is None
    assert difference(a[1:], b, "running")["runs"] == [1.25]  # of the seed that both have
    assert difference(a[1:], b[:1], "running") == {}


def test_what_is_done_is_not_done_again_what_is_lost_is(done, tmp_path):
    cell = done.cells[0]
    log, result = cell.folder / "log.csv", cell.folder / "test.json"
    before = log.stat().st_mtime_ns, result.read_text()
    assert work(done.cells, quiet=True) == [] and log.stat().st_mtime_ns == before[0]
    result.unlink()  # killed between training and testing
    assert work(done.cells, quiet=True) == []
    assert json.loads(result.read_text())["tests"] == json.loads(before[1])["tests"]


def test_cells_of_another_config_are_refused(done):
    cell = done.cells[-1]
    config = opened(json.loads((cell.folder / "config.json").read_text()))
    (cell.folder / "config.json").write_text(json.dumps({**config, "lr": 0.5}))
    try:
        with pytest.raises(L2GError, match="need --lr 0.001, not 0.5, as .* has it; choose another --out"):
            tables(done)
        with pytest.raises(L2GError, match="need --lr 0.001, not 0.5"):
            run_cell(cell)
    finally:
        (cell.folder / "config.json").write_text(json.dumps(config))


def test_equal_wall_time_is_measured_when_a_cell_begins(tmp_path, tiny, monkeypatch):
    """Of updates as the two rows have them, with as many as their costs say, once: what goes on is what began."""
    (cell,) = smoke(tmp_path, "proto-time").cells
    assert cell.config().iterations == 2 and cell.decided is None
    ran, calls = [], Updater.__call__

    def recorded(update, k, asked=0):
        ran.append((update.config.method, update.config.tasks_of_an_update, k))
        return calls(update, k, asked)

    def three_to_two(functions, *, repeats):
        assert [function().finite for function in functions.values()] == [True, True]
        theirs, ours = functions
        return {theirs: [0.9, 0.6, 50.0], ours: [0.6, 70.0, 0.2]}

    monkeypatch.setattr(Updater, "__call__", recorded)
    monkeypatch.setattr("l2g_meta.paper.equal_time.interleaved", three_to_two)
    assert work([cell], quiet=True) == []
    assert ran == [("l2g", 10, 0), ("episodic", 10, 0), *(("episodic", 10, k) for k in range(3))]
    found = cell.result
    assert found["updates"] == cell.config().iterations == 3 and found["tasks"] == 30
    assert found["equal_time"].pop("machine") == found["machine"]
    assert found["equal_time"].pop("ratio") == pytest.approx(1.5)
    medians = {"of_seconds": 0.9, "seconds": 0.6}
    assert found["equal_time"] == {"of": "l2g-proto", "of_updates": 2, "updates": 3, **medians}
    assert "Prototypical Network, time as L2G × 1.50 (0.9 s / 0.6 s)." in markdown(tables(cell.plan))

    (cell.folder / "test.json").unlink()
    assert run_cell(cell)["equal_time"]["updates"] == 3 and len(ran) == 5  # neither measured nor trained again
    changed = opened(json.loads((cell.folder / "config.json").read_text()))
    (cell.folder / "config.json").write_text(json.dumps({**changed, "iterations": 7}))
    with pytest.raises(L2GError, match="need --iterations 3, not 7"):
        run_cell(cell)


def test_what_an_update_of_each_row_costs_is_measured(tmp_path, tiny):
    (cell,) = smoke(tmp_path, "proto-time").cells
    found = equal_time(cell)
    assert found["of"] == "l2g-proto" and found["of_updates"] == 2
    assert found["ratio"] == found["of_seconds"] / found["seconds"] > 0
    assert found["updates"] == max(1, round(2 * found["ratio"]))


def test_tasks_of_varying_ways_and_shots_are_trained_on(tmp_path, tiny, monkeypatch):
    """Table 3: what the objective was given, of each row; T_i is fixed for L2G alone."""
    what = plan(
        "table3", "smoke", tmp_path, columns=["any-both"], rows=["proto-tasks", "l2g-proto-fixed"], device="cpu"
    )
    seen, original = [], updates.tasks_of_calls

    def recorded(pairs, calls):
        found = original(pairs, calls)
        seen.append(
            [[(t.n_way, len(t.support_y) // t.n_way, len(t.query_y) // t.n_way) for t in call] for call in found]
        )
        assert all(
            torch.equal(y, torch.arange(t.n_way).repeat_interleave(len(y) // t.n_way))
            for call in found for t in call for y in (t.support_y, t.query_y)
        )  # fmt: skip
        return found

    monkeypatch.setattr(updates, "tasks_of_calls", recorded)
    assert work(what.cells, quiet=True) == []
    base, l2g = [call for update in seen[:2] for call in update], [call for update in seen[2:] for call in update]
    assert len(seen) == 4 and len(base) == 20 and len(l2g) == 10
    assert all(len(call) == 1 for call in base) and all(call[0] == (5, 5, 2) for call in l2g)
    for tasks in ([task for (task,) in base], [task_j for _, task_j in l2g]):
        assert {ways for ways, _, _ in tasks} == {5, 7, 10} and {shots for _, shots, _ in tasks} == {1, 5, 10}
        assert {queries for _, _, queries in tasks} == {2} and len(set(tasks)) > 4
    for cell in what.cells:
        tests = cell.result["tests"]["running"]
        assert set(tests["settings"]) == {f"{w}w{s}s" for w in (5, 7, 10) for s in (1, 5, 10)}
        assert tests["accuracy_mean"] == pytest.approx(np.mean(list(tests["settings"].values())))
        assert all(math.isfinite(float(row["loss"])) for row in read_log(cell.folder))


def test_rows_begin_with_given_weights_and_the_first_are_tested_as_they_are(tmp_path, tiny):
    """A start of no updates keeps and tests the encoder that was given; all rows are compared with it."""
    (given,) = smoke(tmp_path / "given", "proto").cells
    assert work([given], quiet=True) == []
    what = plan("finetune", "smoke", tmp_path / "out", weights=str(given.folder), device="cpu")
    assert work(what.cells, quiet=True) == []
    theirs, _ = load_run(given.folder)
    by_row = {cell.row: cell for cell in what.cells}
    for row, distance in (("start", "cosine"), ("start-euclidean", "euclidean")):
        ours, config = load_run(by_row[row].folder)
        assert config.distance == distance and config.iterations == 0 and config.weights == str(given.folder)
        tensors = theirs.state_dict()
        assert all(torch.equal(t, tensors[name]) for name, t in ours.state_dict().items())
        assert by_row[row].result["updates"] == by_row[row].result["tasks"] == 0
    assert by_row["start-euclidean"].result["tests"]["running"] == given.result["tests"]["running"]
    rows = {row["row"]: row for row in tables(what)["tables"][0]["rows"]}
    assert set(rows["proto-tasks"]["against"]) == {"start", "start-euclidean"}
    assert set(rows["start"]["against"]) == {"start-euclidean"}
    assert rows["l2g-proto"]["config"]["weights"] == str(given.folder) and rows["l2g-proto"]["updates"] == [2]
    assert "| The start, not trained | " in markdown(tables(what))


def test_fine_tuning_says_what_it_needs(tmp_path):
    with pytest.raises(L2GError, match=r"need --weights RUN\|FILE, .* --scale finetune begins with"):
        plan("finetune", "finetune", tmp_path, root="data")
    what = plan("finetune", "finetune", tmp_path, root="data", weights="w", rows=["l2g-mix-0.5-0.003"])
    configs = [cell.config() for cell in what.cells]
    assert len(configs) == 2 * 3 and {(c.iterations, c.lr, c.pairs, c.image_size, c.inner_lr) for c in configs} == {
        (500, 3e-4, 2, 42, 0.003)
    }


def test_a_failure_is_named_and_the_others_go_on(tmp_path, tiny, monkeypatch):
    what, config = smoke(tmp_path, "proto-tasks", "l2g-proto", "proto"), Cell.config
    broken = {"lr": math.nan}

    def sabotaged(cell):
        return replace(config(cell), **broken).resolved() if cell.row == "l2g-proto" else config(cell)

    monkeypatch.setattr(Cell, "config", sabotaged)
    (failed,) = work(what.cells, quiet=True)
    assert failed.startswith("glyphs 5w1s l2g-proto seed 0: need --lr above 0 and finite, got nan")
    assert sorted(cell.row for cell in what.cells if cell.done) == ["proto", "proto-tasks"]
    values = tables(what)
    assert values["missing"] == ["glyphs 5w1s l2g-proto seed 0"]
    assert "Not done yet: glyphs 5w1s l2g-proto seed 0." in markdown(values)
    assert "| L2G + Prototypical | – | – |" in markdown(values)


def test_a_smaller_command_leaves_the_larger_table(done, monkeypatch):
    monkeypatch.setitem(SCALES, "smoke", replace(SCALES["smoke"], seeds=2))
    path = write_tables(done)
    before = path.read_text()
    write_tables(replace(done, rows=("proto",), seeds=1))
    assert path.read_text() == before and before.count("| Prototypical Network |") >= 2


def test_the_disk_is_full_in_one_cell(tmp_path, monkeypatch):
    what = smoke(tmp_path, "proto-tasks", "proto")

    def full(cell, **options):
        if cell.row == "proto-tasks":
            raise OSError(28, "No space left on device")
        return run_cell(cell, **options)

    monkeypatch.setattr("l2g_meta.paper.cells.run_cell", full)
    failed = work(what.cells, quiet=True)
    assert len(failed) == 1 and "No space left on device" in failed[0]
    assert [cell.row for cell in what.cells if cell.done] == ["proto"]


def test_a_study_of_embedded_data_needs_no_folder(tmp_path):
    assert plan("far-classes", "screen", tmp_path).root is None
    with pytest.raises(L2GError, match="need --data-root, the folder that holds mini-imagenet;"):
        plan("parts", "screen", tmp_path)


def test_missing_data_is_found_before_anything_runs(tmp_path, capsys):
    command = ["reproduce", "table1", "--scale", "small", "--data-root", str(tmp_path / "no"), "--out", str(tmp_path)]
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("l2g: need the train split of mini-ImageNet")
    assert not (tmp_path / "cells").exists()


def test_unknown_rows_columns_devices_and_a_missing_root(tmp_path):
    out = tmp_path / "no-device"
    command = ["reproduce", "table1", "--scale", "smoke", "--device", "abacus", "--out", str(out)]
    assert main(command) == 2 and not out.exists()
    with pytest.raises(L2GError, match="need --rows of matching, .*; got protein"):
        plan("table1", "smoke", Path("none"), rows=["protein"])
    with pytest.raises(L2GError, match="need --columns of any-shot, any-way, any-both; got 5w1s"):
        plan("table3", "smoke", Path("none"), columns=["5w1s"])
    with pytest.raises(L2GError, match="need --data-root, the folder that holds tiered-imagenet; --scale smoke"):
        plan("table2", "small", Path("none"))


def test_an_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    command = ["reproduce", "table1", "--scale", "smoke", "--rows", "proto", "--out", str(tmp_path / "file" / "out")]
    assert main(command) == 2
    assert "need a folder to write for --out, cannot make" in capsys.readouterr().err


COMMAND = [sys.executable, "-m", "l2g_meta", "reproduce", "table1", "--scale", "smoke", "--device", "cpu"]


@pytest.mark.slow
def test_killed_and_shared_by_two_it_gives_the_same_numbers(done, tmp_path):
    command = [*COMMAND, "--out", str(tmp_path), "--runs", "2", "--rows", *done.rows]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, **streams)
    assert any(line.startswith("glyphs 5w1s proto seed 0") for line in first.stderr)
    first.send_signal(signal.SIGKILL)
    first.wait()
    both = [subprocess.Popen(command, **streams) for _ in range(2)]
    printed = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    ran = [line.split(":")[0] for text in printed for line in text.splitlines() if line.startswith("glyphs 5w1s")]
    assert len(ran) == len(set(ran)) == 5  # each cell once
    for cell in done.cells:
        twin = tmp_path / cell.folder.relative_to(done.out)
        a, b = (json.loads((folder / "test.json").read_text()) for folder in (cell.folder, twin))
        assert a["tests"] == b["tests"] and a["tasks"] == b["tasks"]
        assert [r["loss"] for r in read_log(cell.folder)] == [r["loss"] for r in read_log(twin)]


@pytest.mark.parametrize(
    "experiments",
    [("far-classes",), pytest.param((*published.EXPERIMENTS, "far-classes"), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_every_experiment_runs(experiments, tmp_path, capsys):
    for experiment in experiments:
        command = ["reproduce", experiment, "--scale", "smoke", "--device", "cpu", "--out", str(tmp_path)]
        assert main(command) == 0, capsys.readouterr().err
        values = json.loads((tmp_path / f"{experiment}-smoke.json").read_text())
        assert values["missing"] == [] and (tmp_path / f"{experiment}-smoke.md").exists()
        for part in values["tables"]:
            assert all(0 <= row[bn]["accuracy_mean"] <= 100 for row in part["rows"] for bn in ("running", "batch"))
    l2g = values["tables"][0]["rows"][1]
    assert l2g["row"] == "l2g-proto" and -1 < l2g["alignment"] < 1 and -1 <= l2g["cosine"] <= 1
    assert "| alignment | cosine |" in (tmp_path / "far-classes-smoke.md").read_text()
    cells = tmp_path / "cells" / "smoke" / "glyphs"
    rows = EXPERIMENTS["table1"].rows if "table1" in experiments else ()
    assert {p.name for p in (cells / "5w1s").iterdir()} >= {f"{row}-seed0" for row in rows}
    (any_shot,) = plan("table3", "smoke", tmp_path, rows=["l2g-proto-fixed"]).cells
    any_shot = any_shot.config()
    assert any_shot.outer_shots == (1, 5, 10) and any_shot.shots == 5


def test_a_claim_is_exclusive_and_ends_with_its_process(tmp_path):
    path = tmp_path / "lock"
    with claim(path) as ours, claim(path) as again:
        assert ours and not again
    code = "from l2g_meta.files.locks import claim\nfrom pathlib import Path\nimport time\n"
    code += f"with claim(Path({str(path)!r})):\n"
    holder = subprocess.Popen(
        [sys.executable, "-c", code + " print('held', flush=True)\n time.sleep(60)"], stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with claim(path) as ours:
        assert not ours
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with claim(path) as ours:
            if ours:
                break
    assert ours
    with pytest.raises(CheckpointError, match="choose another folder"), claim(tmp_path / "none" / "lock"):
        pass
