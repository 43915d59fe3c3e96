import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from l2g_meta import FewShotClassifier
from l2g_meta.classify import exported as exporting
from l2g_meta.classify.exported import export
from l2g_meta.classify.photos import Preparation
from l2g_meta.classify.source import EMBEDDED, open_source
from l2g_meta.cli.main import main
from l2g_meta.data import load
from l2g_meta.errors import L2GError
from l2g_meta.files.sealed import opened, sealed
from l2g_meta.training.build import load_run
from l2g_meta.training.config import Config
from l2g_meta.training.loop import train

PREPARATION = Preparation(16, 1, (0.5,), (0.5,))


@pytest.fixture(scope="module")
def exported(blob_run, tmp_path_factory):
    """The run as a folder."""
    out = tmp_path_factory.mktemp("exports") / "model"
    export(blob_run, out, episodes=20)
    return out


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "model")


def images(blob_run):
    data = load("folder", "test", root=blob_run.parent / "data", image_size=16)
    return data.images[::3].numpy(), data.labels[::3]


def test_an_export_predicts_as_its_run(blob_run, exported):
    x, y = images(blob_run)
    fitted = FewShotClassifier.load(exported, device="cpu").fit(x, y)
    run = FewShotClassifier(blob_run, temperature=fitted.temperature_, device="cpu").fit(x, y)
    np.testing.assert_array_equal(fitted.predict_proba(x), run.predict_proba(x))
    values = json.loads((exported / "model.json").read_text())
    assert fitted.calibrated_ and fitted.temperature_ == values["calibration"]["shots"][1]["temperature"] != 1
    one_each = np.unique(y, return_index=True)[1]
    assert fitted.fit(x[one_each], y[one_each]).temperature_ == values["calibration"]["shots"][0]["temperature"]


@pytest.mark.parametrize(
    "options",
    [
        {"backbone": "resnet12", "backbone_options": ("widths=4,4,4,6",), "ways": 2, "queries": 2, "pairs": 1},
        {"method": "supervised", "batch": 8},
    ],
    ids=["options of the encoder", "pre-trained"],
)
def test_whatever_was_trained_is_built_again(options, tmp_path):
    config = Config(image_size=20, iterations=1, eval_every=1, eval_episodes=2, device="cpu", **options)
    model = train(config, tmp_path / "run", progress=False).module.eval()
    export(tmp_path / "run", tmp_path / "model", episodes=2)
    found = FewShotClassifier.load(tmp_path / "model", device="cpu").fit(np.zeros((2, 20, 20, 1), np.uint8), [0, 1])
    assert found.source_.model.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(2, 1, 20, 20)
    with torch.no_grad():
        assert torch.equal(found.source_.model.encoder(x), model.encoder(x))


def test_half_precision_is_tested_as_it_is_stored(blob_run, exported, tmp_path):
    values = export(blob_run, tmp_path / "half", half=True, episodes=20)
    files = {p.name: p.stat().st_size for p in (tmp_path / "half").iterdir()}
    assert files.keys() == {"README.md", "model.json", "model.safetensors"} and values["weights"] == "float16"
    assert files["model.safetensors"] < 0.6 * (exported / "model.safetensors").stat().st_size
    x, y = images(blob_run)
    half, whole = (FewShotClassifier(folder, device="cpu").fit(x, y) for folder in (tmp_path / "half", exported))
    weights = half.source_.model.state_dict()
    assert all(t.dtype != torch.float16 for t in weights.values())
    for name, t in whole.source_.model.state_dict().items():
        assert torch.equal(weights[name], t.half().float() if t.is_floating_point() and t.ndim > 1 else t)
    errors = [each.source_.calibration.shots[1].ece_before for each in (half, whole)]
    assert errors[0] == values["calibration"]["shots"][1]["ece_before"] != errors[1]  # measured after rounding


def test_the_model_in_the_package_is_small_and_says_what_it_is(tmp_path, capsys):
    weights, card = EMBEDDED / "model.safetensors", (EMBEDDED / "README.md").read_text(encoding="utf-8")
    assert weights.stat().st_size <= 8e6
    for text in ("research", "licence of l2g-meta's code, MIT, does not change that", "l2g pretrain", "95% interval"):
        assert text in card
    assert main(["export", str(tmp_path / "model")]) == 0
    assert "1-shot: test" in capsys.readouterr().out
    found, own = (json.loads((folder / "model.json").read_text()) for folder in (tmp_path / "model", EMBEDDED))
    assert found["calibration"] == own["calibration"] and found["weights"] == "float32"


def test_an_encoder_by_its_name_is_exported_and_read_again(tmp_path):
    import torchvision

    net = torchvision.models.mobilenet_v3_small(weights=None)
    torch.save(net.state_dict(), tmp_path / "a.pt")
    name, options = "torchvision:mobilenet_v3_small", {"weights": tmp_path / "a.pt", "image_size": 32}
    values = export(name, tmp_path / "model", **options)
    assert values["calibration"] is None and values["preparation"]["resize"] == 37
    assert "ImageNet" in (tmp_path / "model" / "README.md").read_text()
    x, y = np.random.default_rng(0).integers(0, 256, (6, 40, 50, 3), np.uint8), [0, 0, 1, 1, 2, 2]
    read = FewShotClassifier(tmp_path / "model", device="cpu").fit(x, y)
    named = FewShotClassifier(open_source(name, "cpu", **options), device="cpu").fit(x, y)
    np.testing.assert_array_equal(read.predict_proba(x), named.predict_proba(x))


def test_it_is_read_elsewhere_without_the_run(copied, tmp_path):
    code = (
        "import sys, numpy as np; from l2g_meta import FewShotClassifier;"
        "c = FewShotClassifier.load(sys.argv[1], device='cpu');"
        "x = np.eye(3, dtype='uint8')[:, :, None, None].repeat(3, 2).repeat(3, 3) * 255;"
        "print(*c.fit(x, list('abc')).predict(x))"
    )
    done = subprocess.run([sys.executable, "-c", code, copied], capture_output=True, text=True)
    assert done.stdout.split() == ["a", "b", "c"], done.stderr


def test_the_command_writes_all_files_and_a_card(blob_run, tmp_path, capsys):
    out = tmp_path / "deep" / "model"
    assert main(["export", str(blob_run), str(out), "--episodes", "10"]) == 0
    assert {p.name for p in out.iterdir()} == {"README.md", "model.json", "model.safetensors"}
    assert [p.name for p in out.parent.iterdir()] == ["model"]
    values, card = json.loads((out / "model.json").read_text()), (out / "README.md").read_text()
    for entry in values["calibration"]["shots"]:
        row = (
            f"| {entry['shots']} | {entry['accuracy']:.2f} ± {entry['accuracy_ci95']:.2f} | {entry['ece_before']:.4f} |"
        )
        assert row in card and entry["ece_before"] >= 0
    assert values["classes"] == [f"class{c:02d}" for c in range(6)] and "class05" in card
    assert not any(str(blob_run.parent) in text for text in (card, json.dumps(values)))  # nothing of this machine
    printed = capsys.readouterr().out
    assert "5-shot: test" in printed


def test_an_occupied_folder_is_refused(blob_run, tmp_path, capsys):
    assert main(["export", str(blob_run), str(tmp_path)]) == 2
    assert "remove it or choose another" in capsys.readouterr().err


def test_an_interrupted_export_leaves_nothing(blob_run, tmp_path, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "model_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(blob_run, tmp_path / "model", episodes=2)
    assert list(tmp_path.iterdir()) == []


def asking(values, **architecture):
    return json.dumps({**values, "architecture": {**values["architecture"], **architecture}})


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: "[]", "no object with a format"),
        (lambda v: "{", "need an exported model"),
        (lambda v: json.dumps({**v, "format": 99}), "upgrade"),
        (lambda v: json.dumps({**v, "preparation": {"size": 10**9}}), "how images are prepared"),
        (lambda v: json.dumps({**v, "preparation": {**v["preparation"], "size": 10**9}}), "need a size"),
        (lambda v: json.dumps({**v, "preparation": {**v["preparation"], "std": [0, 0, 0]}}), "positive std"),
        (lambda v: json.dumps({**v, "architecture": {"head": "os:system"}}), "names a module as its head, os:system"),
        (lambda v: json.dumps({**v, "architecture": {"hat": 1}}), "need an architecture"),
        (lambda v: json.dumps({**v, "architecture": {**v["architecture"], "backbone": "resnet12"}}), "another model"),
        (lambda v: json.dumps({**v, "calibration": {"shots": [{"shots": 1}]}}), "need a calibration"),
        (lambda v: json.dumps({**v, "calibration": {**v["calibration"], "ways": math.inf}}), "need a calibration"),
        (lambda v: json.dumps({**v, "preparation": {**v["preparation"], "mean": [math.nan]}}), "need a size"),
        (lambda v: json.dumps({**v, "preparation": {**v["preparation"], "mean": [10**400]}}), "need a size"),
        (lambda v: asking(v, inner_steps=10**18), "need --inner-steps to be at least 1 and at most 10,000"),
        (lambda v: asking(v, backbone_options=["channels=20000"]), "has 113,348 values, its config 10,800,860,004"),
        (lambda v: asking(v, backbone_options=["channels=-1"]), "got options channels: .*negative dimension"),
        (lambda v: asking(v, backbone_options=["channels=0"]), "does not take images"),
        (lambda v: asking(v, backbone_options=[f"channels={10**18}"]), "got options channels"),
        (lambda v: asking(v, backbone_options=[f"a{k}=1" for k in range(10**4)]), "got options a0, a1, [^z]{,200}$"),
    ],
)
def test_damaged_exports_end_in_our_error(change, message, copied):
    path = copied / "model.json"
    path.write_text(change(opened(json.loads(path.read_text()))))
    with pytest.raises(L2GError, match=message):
        FewShotClassifier.load(copied, device="cpu")


@pytest.mark.parametrize(
    "value", ["text", None, 1.5, True, [1], {"config": {"lr": []}}, {"glyphs": [{"shots": "x"}]}], ids=str
)
@pytest.mark.parametrize("name", ["training", "elsewhere", "classes", "calibration", "accuracy", "ece_before"])
def test_what_a_stranger_says_of_a_model_is_exported_or_refused(name, value, copied, tmp_path, capsys):
    values = opened(json.loads((copied / "model.json").read_text()))
    (values if name in values else values["calibration"]["shots"][0])[name] = value
    (copied / "model.json").write_text(json.dumps(sealed(values)))
    code = main(["export", str(copied), str(tmp_path / "again")])
    err = capsys.readouterr().err
    assert code == 0 or (err.startswith("l2g: ") and err.count("\n") == 1 and str(copied) in err)
    assert (tmp_path / "again").exists() == (code == 0)


def test_damaged_weights_are_found(copied):
    path = copied / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(L2GError, match="checksum"):
        FewShotClassifier.load(copied, device="cpu")


def test_a_method_that_adapts_is_exported(blob_run, tmp_path):
    config = Config.load(blob_run / "config.json")
    adapting = Config(
        data="folder", root=config.root, image_size=16, ways=3, queries=2, pairs=1, iterations=1, eval_every=1,
        eval_episodes=2, device="cpu", method="maml-softmax", inner_steps=1,
    )  # fmt: skip
    train(adapting, tmp_path / "run", progress=False)
    values = export(tmp_path / "run", tmp_path / "model", episodes=2)
    assert values["calibration"]["ways"] == 3
    x, y = images(blob_run)
    few = y < 3
    assert set(FewShotClassifier(tmp_path / "model", device="cpu").fit(x[few], y[few]).predict(x)) <= {0, 1, 2}


def test_a_run_given_its_data_from_python_says_so(blob_run, tmp_path):
    data = load("folder", "train", root=blob_run.parent / "data", image_size=16)
    config = Config(ways=3, queries=2, pairs=1, iterations=1, eval_every=1, eval_episodes=2, device="cpu")
    train(config, tmp_path / "run", data=data, validation=data, progress=False)
    with pytest.raises(L2GError, match="belong to the name of an encoder"):
        export(tmp_path / "run", tmp_path / "model", weights="a.pt")
    with pytest.raises(L2GError, match="was given its data from Python"):
        export(tmp_path / "run", tmp_path / "model")
    with pytest.raises(L2GError, match="was given its data from Python"):
        FewShotClassifier.load(tmp_path / "run", device="cpu")
    wrapper, _ = load_run(tmp_path / "run", device="cpu")
    assert FewShotClassifier(wrapper, device="cpu").fit(data.gather([0, 12]), ["a", "b"]).classes_.tolist() == [
        "a",
        "b",
    ]
