"""`l2g report`: what the page says and holds, whatever the runs are; ``test_report_browser.py`` looks at it."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from l2g_meta import MetricModel, PrototypicalHead
from l2g_meta.classify.calibration import expected_calibration_error
from l2g_meta.cli.main import main
from l2g_meta.data import ClassDataset
from l2g_meta.errors import L2GError
from l2g_meta.evaluation.episodes import evaluate, paired_difference
from l2g_meta.files.sealed import opened
from l2g_meta.files.tensors import load_tensors, save_tensors
from l2g_meta.report.experiments import Experiment, Report, differences, evaluate_runs
from l2g_meta.report.image_section import confusion, hardest
from l2g_meta.report.measure import EpisodePredictions, ReportOptions, measure
from l2g_meta.report.page import LIMIT, render
from l2g_meta.report.projection import projected, sample_rows
from l2g_meta.report.thumbnails import COLUMNS, Sheet
from l2g_meta.training.build import build_data

FEW = ReportOptions(episodes=12, classes=6)
SCRIPT = "<script>alert(1)</script>"


class Parsed(HTMLParser):
    """Tags that are open at the end, tags with attributes, and text."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes another"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def report(trained_glyphs):
    return evaluate_runs(trained_glyphs, FEW, tell=lambda line: None)


@pytest.fixture(scope="module")
def page(report):
    return render(report)


def test_accuracies_are_those_of_evaluate(report, trained_glyphs):
    measured = measure(trained_glyphs[0], FEW, build_data)
    again = evaluate(measured.model, measured.data, ways=5, shots=1, queries=5, episodes=12)
    first = report.runs[0].measured
    assert first.evaluation.accuracies == again.accuracies
    shares = [100 * answer.correct.mean() for answer in first.predictions]
    np.testing.assert_allclose(shares, again.accuracies)  # and so are the answers, with their rows
    labels = np.asarray(measured.data.labels)
    for answer in first.predictions:
        assert (labels[answer.rows.query] == answer.rows.classes[answer.rows.query_y]).all()


def test_seeds_are_one_experiment_and_others_are_compared_on_the_same_episodes(report):
    assert [[run.label for run in e.runs] for e in report.experiments] == [["A1", "A2"], ["B"]]
    (difference,) = differences(report)
    a, b = report.experiments
    assert (difference["mean"], difference["episodes"]) == paired_difference(b.evaluation, a.evaluation)
    assert difference["seeds"] is None and a.evaluation.ci95_runs is not None


def test_runs_of_other_shapes_are_not_compared(report):
    a, b = report.experiments
    other = replace(b.runs[0].measured, evaluation=replace(b.evaluation, ways=3))
    changed = Experiment(1, [replace(b.runs[0], measured=other)])
    assert list(differences(Report(FEW, [a, changed]))) == []


def test_what_the_page_says(page, report):
    parsed = Parsed(page)
    assert parsed.open == []
    assert [values["id"] for tag, values in parsed.tags if tag == "section"] == [
        "summary", "accuracy", "settings", "curves", "confusion", "embeddings", "episodes",
    ]  # fmt: skip
    for tag, values in parsed.tags:
        if tag == "a":
            assert f'id="{values["href"][1:]}"' in page
        if tag == "svg" or values.get("role") == "img":
            assert values["aria-label"]
    for experiment in report.experiments:
        e = experiment.evaluation
        assert f"{e.accuracy_mean:.1f} ± {e.ci95_episodes:.1f} %" in parsed.text
    e = report.experiments[0].evaluation
    assert f"± {e.ci95_runs:.1f} over 2 trained seeds (Student t)" in parsed.text
    assert (
        "Over 12 episodes and 2 trained seeds of the test split, 5-way 1-shot, 5 queries per class, BatchNorm" in page
    )
    assert "--method episodic l2g" in parsed.text
    for run in report.runs:
        for e in run.measured.frozen.values():
            assert f"{e.accuracy_mean:.2f} ± {e.ci95_episodes:.2f}" in parsed.text and len(e.accuracies) == 12
    assert len(page.encode()) < LIMIT


def test_nothing_is_loaded_and_no_other_script_may_run(page):
    parsed = Parsed(page)
    (policy,) = [v["content"] for _, v in parsed.tags if v.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src 'sha256-" in policy
    sources = [v.get("src") or v.get("href") or "" for _, v in parsed.tags]
    assert all(s.startswith(("#", "data:")) for s in sources if s) and "http://" not in page and "https://" not in page
    assert re.findall(r"url\((.{5})", page) == ["data:"]


def test_the_same_runs_give_the_same_bytes(page, trained_glyphs):
    assert render(evaluate_runs(trained_glyphs, FEW, tell=lambda line: None)) == page


@pytest.fixture()
def copied(trained_glyphs, tmp_path):
    return shutil.copytree(trained_glyphs[0], tmp_path / "run")


def page_of(*runs, **asked):
    report = evaluate_runs(runs, ReportOptions(**{"episodes": 3, "classes": 3} | asked), tell=lambda line: None)
    text = render(report)
    assert Parsed(text).open == []
    return report, text


def change_config(run, **values):
    path = run / "config.json"
    path.write_text(json.dumps(opened(json.loads(path.read_text())) | values))


def test_strings_of_a_strangers_run_are_text(copied):
    evil = copied.rename(copied.with_name("<img src=x onerror=alert(1)>"))
    change_config(evil, head="</script>" + SCRIPT, backbone="grün\tβ 字 \udc80\x01")
    report, text = page_of(evil)
    assert report.runs[0].measured is None
    parsed = Parsed(text)
    assert [tag for tag, _ in parsed.tags].count("script") == 1 and "img" not in [tag for tag, _ in parsed.tags]
    assert SCRIPT in parsed.text and "<img src=x onerror=alert(1)>" in parsed.text
    assert not any(name.startswith("on") for _, values in parsed.tags for name in values)
    text.encode()  # a lone surrogate is none of the page's
    assert "grün β 字 ??" in parsed.text


def test_class_names_are_text(tmp_path, trained_glyphs):
    images = torch.randint(0, 255, (30, 28, 28, 1), dtype=torch.uint8)
    names = (SCRIPT, '" onfocus="alert(1)', "</title>", "'><b>", "&amp;")
    data = ClassDataset(images, torch.arange(30) // 6, class_names=names, name=SCRIPT, split="test")

    report = evaluate_runs(trained_glyphs[:1], FEW, tell=lambda line: None)
    report.runs[0].measured = measure(trained_glyphs[0], FEW, lambda config, split: data)
    parsed = Parsed(render(report))
    assert [tag for tag, _ in parsed.tags].count("script") == 1 and parsed.open == []
    assert not any(name.startswith("on") for _, values in parsed.tags for name in values)
    labels = [values.get("aria-label", "") for _, values in parsed.tags]
    assert any(label.endswith(names[1]) for label in labels) and all(name in parsed.text for name in names)


@pytest.mark.parametrize("lost", ["log.csv", "best.safetensors", "config.json"])
def test_a_run_is_shown_with_what_there_is(copied, lost, capsys):
    (copied / lost).unlink()
    out = copied.parent / "page.html"
    assert main(["report", str(copied), "-o", str(out), "--episodes", "3", "--classes", "3"]) == 1
    said = capsys.readouterr()
    assert lost in said.err and "kB" in said.out
    parsed = Parsed(out.read_text(encoding="utf-8"))
    assert lost in parsed.text
    shown = [values["id"] for tag, values in parsed.tags if tag == "section"]
    assert ("curves" in shown) == (lost != "log.csv") and ("accuracy" in shown) == (lost == "log.csv")


def test_a_run_that_goes_on(copied):
    lines = (copied / "log.csv").read_text().splitlines(keepends=True)
    (copied / "log.csv").write_text("".join(lines[:3]) + "4,rubbish,,,\n5,nan,\n" + "x" * 300)
    report, text = page_of(copied)
    assert report.runs[0].updates == 2 and "unfinished: 2 of 8 updates" in Parsed(text).text
    (copied / "log.csv").write_text("")
    text = Parsed(page_of(copied)[1]).text
    assert "learning curve cut off: log.csv ends at update 0, the best checkpoint is of" in text
    (copied / "log.csv").write_bytes(b"iteration,loss\n\xff\xfe\x00\n")
    assert "learning curve cut off: log.csv ends at update 0" in Parsed(page_of(copied)[1]).text


def test_a_model_given_from_python_is_not_guessed(copied):
    tensors, info = load_tensors(copied / "best.safetensors")
    save_tensors(copied / "best.safetensors", tensors, info | {"given": ["model"]})
    assert "was given its model from Python" in Parsed(page_of(copied)[1]).text


def test_other_splits_and_shapes_are_named(copied):
    text = Parsed(page_of(copied, split="train", ways=3, shots=2, bn="batch")[1]).text
    assert "training classes, which the model has seen" in text
    assert "3-way 2-shot, 5 queries per class, BatchNorm batch" in text


def test_a_method_without_an_embedding(copied, tmp_path):
    out = tmp_path / "maml"
    flags = "--iterations 1 --eval-episodes 2 --ways 3 --inner-steps 1 --device cpu".split()
    assert main(["train", "--method", "maml-softmax", *flags, "--out", str(out)]) == 0
    assert "SoftmaxMAML adapts to each task and has no embedding" in Parsed(page_of(out)[1]).text


@pytest.mark.parametrize("what", ["nothing", "empty", "twice", "folder", "file in the way"])
def test_what_cannot_be(what, copied, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.html").write_text("old")
    out = {"folder": tmp_path / "empty", "file in the way": tmp_path / "page.html" / "x.html"}.get(what)
    runs = {"nothing": [tmp_path / "nothing"], "empty": [tmp_path / "empty"], "twice": [copied, copied / "."]}
    given = map(str, runs.get(what, [copied]))
    assert main(["report", *given, "-o", str(out or tmp_path / "page.html"), "--episodes", "2"]) == 2
    wanted = {
        "nothing": "no folder of that name; name a folder made by `l2g train`",
        "empty": "a folder without config.json and log.csv; name",
        "twice": "need different runs, got .* more than once; leave one out",
        "folder": "need a file to write for --out, got the folder .*; name a file in it",
        "file in the way": "need a file to write for --out, got .*; choose another",
    }
    assert re.search(wanted[what], capsys.readouterr().err)
    assert (tmp_path / "page.html").read_text() == "old"


def test_an_existing_page_is_replaced_whole(copied, tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    out.write_text("old")
    command = ["report", str(copied), "-o", str(out), "--episodes", "2", "--classes", "2"]
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert main(command) == 2
    assert out.read_text() == "old"
    assert main(command) == 0
    assert out.read_text(encoding="utf-8").endswith("</html>\n") and not list(tmp_path.glob(".page*"))


def test_confusion_counts_each_query_once_and_divides_by_the_meetings():
    rng = np.random.default_rng(0)
    answers = []
    for _ in range(40):
        classes = rng.choice(6, 3, replace=False)
        y = np.repeat(np.arange(3), 4)
        predicted = np.where(classes[y] == 5, 0, y)  # class 5 is taken for the episode's first; the others are right
        from l2g_meta.data.sources import TaskRows

        answers.append(EpisodePredictions(TaskRows(classes, np.arange(3), y, y, classes), predicted))
    found = confusion(answers, 6)
    assert found.taken.sum() == 40 * 12 and np.diag(found.offered).sum() == 40 * 12
    assert hardest([found], 1) == [5] and (np.diag(found.rates)[:5] == 1).all()
    assert (found.rates[5][:5] <= 1).all() and found.taken[5, :5].sum() > 0
    np.testing.assert_array_equal(confusion([*answers, *answers], 6).rates, found.rates)


def test_calibration_of_predictions_that_are_right_as_often_as_they_say():
    confidence = torch.tensor([0.25, 0.75]).repeat_interleave(1000)
    correct = torch.arange(2000) % 4 < torch.tensor([1, 3]).repeat_interleave(1000)
    assert expected_calibration_error(confidence, correct) == pytest.approx(0)
    assert expected_calibration_error(confidence, ~correct) == pytest.approx(0.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_thumbnail_lies_where_the_page_looks_for_it(channels):
    values = torch.arange(0, 250, 6, dtype=torch.uint8)
    data = ClassDataset(values.view(-1, 1, 1, 1).expand(-1, 28, 28, channels).contiguous(), torch.arange(len(values)))
    sheet = Sheet(data)
    places = {row: sheet.place(row) for row in range(len(values) - 1, -1, -1)}
    assert len(set(places.values())) == len(values) > COLUMNS and sheet.place(7) == places[7]
    with Image.open(io.BytesIO(base64.b64decode(sheet.encoded(32, 80).partition(",")[2]))) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    for row, (x, y) in places.items():
        tile = pixels[y * 32 : y * 32 + 32, x * 32 : x * 32 + 32]
        assert abs(tile - int(values[row])).max() <= 3  # to the edge: no neighbour runs into it


def test_points_are_capped_and_shared_out(report):
    measured = report.runs[0].measured
    rows = sample_rows(measured.data, [0, 3], points=20)
    assert np.asarray(measured.data.labels)[rows].tolist() == [0] * 10 + [3] * 10
    assert len(sample_rows(measured.data, [])) == 0
    with pytest.raises(L2GError, match="at least 4 images and 2 features, got 2 and"):
        projected(measured.model, measured.data, rows[:2])
    narrow = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(measured.data.gather([0]).numel(), 1))
    with pytest.raises(L2GError, match="2 features, got 20 and 1"):
        projected(MetricModel(narrow, PrototypicalHead()), measured.data, rows)


def test_too_large_a_page_gets_smaller_thumbnails(page, report, monkeypatch):
    monkeypatch.setattr("l2g_meta.report.page.LIMIT", len(page.encode()) - 1)
    assert len(render(report)) < len(page)
