"""How the command line behaves: help, typos, quiet, JSON, odd terminals, doctor."""

import argparse
import functools
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import l2g_meta
from l2g_meta.cli import COMMANDS, command, doctor
from l2g_meta.cli.main import main
from l2g_meta.cli.output import STDOUT, output_of, print_anything
from l2g_meta.cli.parser import build_parser
from l2g_meta.training.config import Config

TINY = "--image-size 16 --ways 3 --queries 2 --pairs 1 --iterations 2 --eval-every 2 --eval-episodes 4 --device cpu"


def said(capsys, line):
    """Exit code, stdout, stderr."""
    try:
        code = main(line.split())
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_help_takes_no_pytorch():
    code = (
        "import sys; from l2g_meta.cli.main import main\n"
        "try: main(['--help'])\n"
        "finally: print(sorted({'torch', 'numpy', 'l2g_meta.training.config'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "examples:" in done.stdout


def test_public_names_are_there_at_first_use():
    starred = {}
    exec("from l2g_meta import *", starred)  # noqa: S102
    del starred["__builtins__"]
    assert set(dir(l2g_meta)) == set(l2g_meta.__all__) == set(starred) <= set(l2g_meta._HOME_OF)
    assert set(starred) == {
        "L2GWrapper", "Task", "TaskPairs", "Episodes", "load", "MetricModel", "PrototypicalHead", "RelationHead",
        "MatchingHead", "FullContextMatchingHead", "Conv4", "ResNet12", "relation_embedding", "Config", "train",
        "load_run", "evaluate", "paired_difference", "FewShotClassifier", "check_head",
    }  # fmt: skip
    assert all(getattr(l2g_meta, name).__name__ == name for name in l2g_meta._HOME_OF)
    with pytest.raises(AttributeError, match="has no attribute 'Conv5'"):
        l2g_meta.Conv5  # noqa: B018


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself(name, capsys):
    code, out, _ = said(capsys, f"{name} --help")
    examples = out.partition("examples:\n")[2].splitlines()
    assert code == 0 and 2 <= len(examples) <= 5 and all(line.startswith("  l2g ") for line in examples)
    parser = build_parser([name])
    for line in examples:  # they are commands that l2g takes
        words = line.partition("#")[0].replace("&& l2g train", "").partition(">")[0].split()[1:]
        if words[0] == name:
            parser.parse_args(words)


def test_train_has_a_flag_for_each_setting(capsys):
    out = said(capsys, "train --help")[1]
    assert all(f"--{f.name.replace('_', '-')} " in out for f in fields(Config)) and len(fields(Config)) <= 50


def test_metavars_are_a_few_words():
    found = set()
    for parser in build_parser()._subparsers._group_actions[0].choices.values():
        found |= {a.metavar or a.dest.upper() for a in parser._actions if a.nargs != 0 and a.choices is None}
    assert found <= {
        "RUN", "DIR", "FILE", "DIR|FILE", "OUT", "NAME", "N", "N,N", "X", "ROW", "COLUMN", "RATE", "NAME=VALUE",
        "RUN|FILE", "RUN|FILE|default", "RUN|NAME",
    }  # fmt: skip


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "l2g: need a command of train, pretrain, .*; see l2g --help"),
        ("trian --shots 5", "need one of train, .*; got 'trian'; did you mean train\\?"),
        (
            "train --shotz 5",
            "l2g train: need only what it takes, got --shotz 5 besides; did you mean --shots\\?; see l2g",
        ),
        ("train -shots 5", "got -shots 5 besides; did you mean --shots\\?"),
        ("train photos", "l2g train: need only what it takes, got photos besides; see l2g train --help"),
        ("train --method l2gg", "argument --method: need one of .*; got 'l2gg'; did you mean l2g\\?"),
        ("train --lr fast", "argument --lr: need a number, got 'fast'"),
        ("train --seed 1.5", "argument --seed: need a whole number, got '1.5'"),
        ("evaluate run --ways five", "argument --ways: need a whole number of at least 2, got 'five'"),
        ("evaluate", "l2g: need RUN, or --data"),
        ("predict --modle run --support a --query b", "got --modle run besides; did you mean --model\\?"),
        ("predict --model run", "l2g predict: need --support, --query"),
        ("reproduce table9", "need one of table1, .*; got 'table9'; did you mean table3\\?"),
    ],
)
def test_typos(line, message, capsys):
    code, out, err = said(capsys, line)
    assert (code, out) == (2, "") and re.search(message, err) and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "line, message",
    [
        (
            "train --head protoypical --image-size 16 --ways 3 --queries 2 --data folder --root {1}",
            "got 'protoypical'; did you mean prototypical\\?",
        ),
        ("train --resume {0}/nowhere", "need a run's config in .*, got: No such file .*; name a folder made by"),
        (
            "train --out {0}/file --image-size 16 --ways 3 --queries 2 --data folder --root {1}",
            "cannot make .*; choose another --out",
        ),
        ("train --json {0}", "need a file to write for --json, got the folder"),
        ("evaluate {0}/file", "need a run's config in .*, got: Not a directory"),
        ("export {0} {0}/out", "need a run's config in"),
        ("reproduce table1 --rows prto --data-root {0}", "got prto; did you mean proto\\?"),
    ],
)
def test_wrong_files_and_names(line, message, blob_run, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    code, out, err = said(capsys, line.format(tmp_path, blob_run.parent / "data"))
    assert (code, out) == (2, "") and err.startswith("l2g: ") and re.search(message, err) and err.count("\n") == 1, err


def test_quiet_and_json(blob_run, tmp_path, capsys):
    train = f"train --data folder --root {blob_run.parent / 'data'} {TINY} --out {tmp_path}"
    assert said(capsys, f"{train}/a --quiet") == (0, "", "")
    code, out, err = said(capsys, f"{train}/b --json")
    found = json.loads(out)
    assert code == 0 and (found["run"], found["best_iteration"], found["skipped"]) == (f"{tmp_path}/b", 2, 0)
    assert f"best validation {found['best_val_accuracy']:.2f} %" in err  # what stdout has otherwise
    assert said(capsys, f"{train}/c --json {tmp_path}/c.json --quiet") == (0, "", "")
    assert json.loads((tmp_path / "c.json").read_text())["best_val_accuracy"] == found["best_val_accuracy"]

    evaluate = f"evaluate {blob_run} --episodes 3"
    printed = said(capsys, f"{evaluate} --json {tmp_path}/e.json")[1]
    in_file = json.loads((tmp_path / "e.json").read_text())
    assert f"{in_file['accuracy_mean']:.2f} ±" in printed
    for ending in ("--json", "--json -", "--json --quiet"):
        assert json.loads(said(capsys, f"{evaluate} {ending}")[1]) == in_file
    assert said(capsys, f"{evaluate} --quiet") == (0, "", "")

    photos = blob_run.parent / "data" / "test"
    predict = f"predict --model {blob_run} --support {photos} --query {photos / 'class00'}"
    assert said(capsys, f"{predict} --quiet --csv {tmp_path / 'p.csv'}") == (0, "", "")
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 13
    code, out, err = said(capsys, f"{predict} --json --quiet")
    assert (code, err, json.loads(out)["classified"]) == (0, "", 12)

    code, out, err = said(capsys, f"export {blob_run} {tmp_path / 'model'} --episodes 2 --json --quiet")
    assert code == 0 and json.loads(out)["out"] == str(tmp_path / "model")


def test_terminals_that_lack_characters(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    print_anything()
    print("50.00 ± 0.50 %, α, ü, \udcff", flush=True)
    assert raw.getvalue() == b"50.00 \\xb1 0.50 %, \\u03b1, \\xfc, \\udcff\n"


@pytest.mark.parametrize("json_to", [None, STDOUT])
def test_lines_that_go_nowhere_hold_any_name(json_to):
    with output_of(argparse.Namespace(json=json_to, quiet=True)):
        print("\udcff.csv", flush=True)


@pytest.mark.parametrize(
    "error, code, message",
    [
        (KeyboardInterrupt(), 130, "l2g: interrupted; {}\n"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (PermissionError(13, "Permission denied", "log.csv"), 2, "l2g: cannot use log.csv: Permission denied\n"),
        (OSError(28, "No space left on device"), 2, "l2g: cannot read or write: No space left on device\n"),
        (MemoryError("of 9 GB"), 2, "l2g: need more memory than there is: of 9 GB; lower --pairs"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "l2g: need more memory than there is: Default"),
    ],
)
@pytest.mark.parametrize("name", ["predict", "export", "evaluate"])
def test_whatever_ends_a_command(name, error, code, message, monkeypatch, capsys):
    def end(_):
        raise error

    monkeypatch.setattr(command(name), "run", end)
    line = {"predict": "--model m --support s --query q", "export": "run out", "evaluate": "run"}[name]
    found, out, err = said(capsys, f"{name} {line}")
    assert (found, out) == (code, "") and err.startswith(message.format(command(name).INTERRUPTED))


def test_other_errors_are_not_hidden(monkeypatch):
    def end(_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(command("evaluate"), "run", end)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["evaluate", "run"])


NEEDED = [("torch", ""), ("no-such-package", "timm"), ("not-looked-at", "dev")]


@pytest.fixture
def few_parts(monkeypatch):
    """The doctor looks at one optional package: importing all takes seconds."""
    monkeypatch.setattr(doctor, "needed", lambda: NEEDED)


@pytest.mark.usefixtures("few_parts")
def test_doctor(capsys):
    code, out, err = said(capsys, "doctor")
    assert (code, err) == (0, "") and "all that is required works" in out and "not-looked-at" not in out
    assert re.search('no-such-package  missing: pip install "l2g-meta\\[timm]"', out)
    code, out, err = said(capsys, "doctor --json")
    found = json.loads(out)
    assert code == 0 and found["works"] and "threads" in found["machine"]["CPU"] and "self test" in err
    assert found["self test"] == {"meta-gradient": "ok"} and found["required"]["l2g-meta"] == l2g_meta.__version__


@pytest.mark.usefixtures("few_parts")
def test_doctor_finds_what_does_not_work(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("l2g_meta.models.blocks.ConvBlock", lambda *_, **__: 1 / 0)
        code, out, _ = said(capsys, "doctor")
        assert code == 1 and out.count("does not work: ZeroDivisionError: division by zero\n") == 1
    with monkeypatch.context() as patch:  # a gradient that is not the exact one
        patch.setattr(l2g_meta, "L2GWrapper", functools.partial(l2g_meta.L2GWrapper, first_order=True))
        assert doctor.examine()["self test"]["meta-gradient"].startswith("does not work: GradcheckError")
        code, out, err = said(capsys, "doctor --quiet")
        assert (code, out, err) == (1, "", "l2g: something required does not work; l2g doctor says what\n")
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "needed", lambda: [("no-such-package", "")])
        code, out, _ = said(capsys, "doctor")
        assert (
            code == 1 and "does not work: ModuleNotFoundError: " in out and "--force-reinstall no-such-package" in out
        )


@pytest.mark.parametrize(
    "text, found",
    [
        ("raise RuntimeError('built for\\n another torch')", "does not work: RuntimeError: built for another torch"),
        ("import sys; sys.exit(3)", "does not work: SystemExit: 3; mend it"),
        ("def", "does not work: SyntaxError"),
        ("", l2g_meta.__version__),
    ],
)
def test_broken_packages_are_told(text, found, tmp_path, monkeypatch):
    (tmp_path / "l2g_broken_part.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "l2g_broken_part", raising=False)
    assert doctor.look("l2g-meta", "mend it", module="l2g_broken_part").startswith(found)


def test_the_doctor_looks_at_what_the_project_needs(monkeypatch):
    found = doctor.needed()
    assert {("torch", ""), ("scikit-learn", ""), ("timm", "timm")} <= set(found)
    assert set(doctor.EXTRAS) <= {extra for _, extra in found}
    assert all(doctor.look(name, "", module=module)[0].isdigit() for name, module in doctor.MODULES.items())
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: doctor.metadata.distribution("no-such-package"))
    assert doctor.needed() == []  # a checkout that is not installed


def test_doctor_without_torch_says_what_brings_it(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('broken on purpose')\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parent.parent}"}
    run = functools.partial(subprocess.run, capture_output=True, text=True, env=env, cwd=tmp_path)
    done = run([sys.executable, "-m", "l2g_meta", "doctor"])
    assert done.returncode == 1 and not done.stderr, done.stderr
    assert "does not work: ImportError: broken on purpose; pip install --force-reinstall torch" in done.stdout
    done = run([sys.executable, "-m", "l2g_meta", "train"])
    assert done.returncode == 2 and done.stderr == (
        "l2g: broken on purpose; l2g doctor says what is missing, and what adds it\n"
    )
