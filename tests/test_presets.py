import json
from dataclasses import asdict
from pathlib import Path

import pytest

from l2g_meta.cli.main import main
from l2g_meta.cli.parser import build_parser
from l2g_meta.cli.train import new_run
from l2g_meta.paper.plan import plan
from l2g_meta.training.config import REMOVED, Config
from l2g_meta.training.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_config_that_can_be_run(name):
    Config(**preset(name), root=None if preset(name)["data"] == "glyphs" else "data").resolved()


@pytest.mark.parametrize(
    ("name", "study", "column", "row"),
    [
        ("mini-28px-episodic", "tasks", "5w1s", "proto-tasks"),
        ("mini-28px-l2g", "tasks", "5w1s", "l2g-proto"),
        ("mini-28px-l2g-mix", "tasks", "5w1s", "l2g-mix-0.5"),
        ("mini-28px-l2g-mix-0.003", "tasks", "5w1s", "l2g-mix-0.5-0.003"),
        ("mini-28px-5shot-episodic", "tasks", "5w5s", "proto-tasks"),
        ("mini-28px-5shot-l2g-mix", "tasks", "5w5s", "l2g-mix-0.5"),
        ("glyphs-episodic", "far-classes", "5w1s", "proto-tasks"),
        ("glyphs-l2g-mix-0.003", "far-classes", "5w1s", "l2g-mix-0.5-0.003"),
    ],
)
def test_presets_are_the_runs_of_the_study(name, study, column, row):
    root = None if study == "far-classes" else "data"
    cells = plan(study, "confirm", Path("none"), root=root, columns=[column], rows=[row]).cells
    cell = next(cell for cell in cells if cell.seed == 0)
    config = Config(**preset(name), root=root).resolved()
    assert cell.config().differences(config) == ""


def test_l2g_trains_with_a_mix_unless_it_is_told_otherwise_and_older_runs_had_none():
    mixes = [Config(method=method).resolved().mix for method in ("l2g", "maml", "episodic")]
    assert mixes == [0.5, 0.0, 0.0] and Config(mix=0.0).resolved().mix == 0.0
    older = {name: value for name, value in vars(Config().resolved()).items() if name != "mix"}
    assert Config.from_json(older).resolved().mix == 0.0


def test_removed_fields_are_dropped_at_their_old_default_and_refused_otherwise(tmp_path, capsys):
    config = Config(method="maml").resolved()
    path = tmp_path / "config.json"
    old = {name: values[-1] if values else 7 for name, values in REMOVED.items()}
    before = asdict(config) | old | {"outer_queries": config.queries}  # as version 0.1.0 wrote it
    path.write_text(json.dumps(before))
    assert Config.load(path) == config
    changed = {"inner_on": "supports", "fresh_queries": True, "shared_classes": 2, "outer_queries": 99, "test_steps": 3}
    for name, value in changed.items():
        path.write_text(json.dumps(before | {name: value}))
        assert main(["train", "--resume", str(tmp_path)]) == 2
        shown = f"got {name} = {value!r}; l2g-meta 0.1.0 is the last version that knows it"
        error = capsys.readouterr().err
        assert shown in error and error.count("\n") == 1


def test_flags_win(tmp_path, capsys):
    train = ["train", "--preset", "mini-28px-l2g-mix", "--root", str(tmp_path)]
    config, _ = new_run(build_parser(["train"]).parse_args([*train, "--mix", "0.25", "--seed", "3"]))
    assert (config.mix, config.seed, config.pairs, config.image_size) == (0.25, 3, 2, 28)
    assert main(["train", "--preset", "mini-28px-l2g-mx"]) == 2
    assert "did you mean mini-28px-l2g-mix?" in capsys.readouterr().err
    assert main(["train", "--preset", "mini-28px-l2g", "--resume", str(tmp_path)]) == 2
    assert "leave --preset out" in capsys.readouterr().err
