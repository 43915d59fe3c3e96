import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from l2g_meta import (
    Conv4,
    FewShotClassifier,
    FullContextMatchingHead,
    L2GWrapper,
    MatchingHead,
    MetricModel,
    PrototypicalHead,
    RelationHead,
    Task,
    relation_embedding,
)
from l2g_meta.classify import calibration as c
from l2g_meta.classify import scoring
from l2g_meta.classify.photo_folder import PhotoReader, classify_files, embed_files, fit_folder
from l2g_meta.classify.photos import Preparation
from l2g_meta.classify.source import Source, open_source
from l2g_meta.data import ClassDataset, MapDataset, load
from l2g_meta.errors import DataError, FitError, L2GError
from l2g_meta.evaluation import episodes
from l2g_meta.evaluation.frozen import evaluate_heads
from l2g_meta.models.maml import SoftmaxMAML
from l2g_meta.report.projection import projected
from l2g_meta.training.build import load_run

VECTORS = MetricModel(nn.Flatten(), PrototypicalHead())
GREY = Preparation(16, 1, (0.5,), (0.5,))


def image_model(head=None, encoder=None):
    torch.manual_seed(0)
    model = MetricModel(encoder or Conv4(1, 8), head or PrototypicalHead())
    with torch.no_grad():  # statistics that differ from a batch's own
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape))
    return model


def classifier(model, **options):
    return FewShotClassifier(model, device="cpu", **options)


# Vectors, since scikit-learn's checks bring tables of 1 to 10 columns: a module of which nothing is known takes any.
# None of the checks is expected to fail.
@parametrize_with_checks([classifier(VECTORS)])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def test_scikit_learn_splits_flattened_images(blob_run):
    data = load("folder", "test", root=blob_run.parent / "data", image_size=16)
    flat = data.gather(range(len(data))).flatten(1).numpy()
    scores = cross_val_score(classifier(blob_run), flat, np.array(data.class_names)[data.labels], cv=3)
    assert scores.shape == (3,) and scores.mean() > 0.5


def test_all_kinds_of_images_are_the_same_to_it(blob_run):
    data = load("folder", "test", root=blob_run.parent / "data", image_size=16)
    rows = np.concatenate([r[:3] for r in data.index])
    pixels, y = data.images[rows], np.array(data.class_names)[data.labels[rows]]
    inputs = data.gather(rows)
    paths = sorted((blob_run.parent / "data" / "test").glob("*/[0-9]*.png"))
    kinds = {
        "uint8 NHWC": pixels.numpy(),
        "uint8 NCHW": pixels.permute(0, 3, 1, 2).numpy(),
        "uint8 tensor": pixels,
        "list of arrays": list(pixels.numpy()),
        "list of tensors": list(pixels),
        "PIL": [Image.fromarray(p) for p in pixels.numpy()],
        "floats": inputs.numpy(),
        "double": inputs.double().numpy(),
        "float tensor": inputs,
        "flat": inputs.flatten(1).numpy(),
    }
    fitted = classifier(blob_run).fit(pixels, y)
    expected = fitted.predict_proba(inputs)
    for kind, images in kinds.items():
        np.testing.assert_allclose(classifier(blob_run).fit(images, y).predict_proba(images), expected, err_msg=kind)
    as_text = list(map(str, paths))
    from_paths = fitted.predict_proba(paths)
    np.testing.assert_array_equal(fitted.predict_proba(as_text), from_paths)
    np.testing.assert_array_equal(fitted.predict_proba(np.array(as_text)), from_paths)


@pytest.mark.parametrize("data", ["folder", "mini-imagenet"])
def test_files_are_prepared_exactly_as_in_training(data, blob_run, blobs, tmp_path):
    # Images 20 x 16, so that cropping and stretching differ.
    root = blob_run.parent / "data"
    if data == "mini-imagenet":
        for split in ("train", "validation", "test"):
            blobs(tmp_path / "mini-imagenet" / split, 2, 2, size=(20, 16))
        root = tmp_path
    loaded = load(data, "test", root=root, image_size=12)
    from l2g_meta.training.config import Config

    preparation = Preparation.of_training(Config(data=data).resolved(), loaded.image_shape)
    folder = root / "test" if data == "folder" else root / "mini-imagenet" / "test"
    files = [str(p) for name in loaded.class_names for p in sorted((folder / name).iterdir())]
    x = preparation.normalised(np.stack([preparation.read(f) for f in files]), torch.device("cpu"))
    assert torch.equal(x, loaded.gather(range(len(loaded))))


def test_probabilities_are_those_of_the_model_on_the_task(blob_run):
    wrapper, _ = load_run(blob_run, device="cpu")
    data = load("folder", "test", root=blob_run.parent / "data", image_size=16)
    s, q = np.concatenate([r[:2] for r in data.index]), np.concatenate([r[2:] for r in data.index])
    y = torch.tensor(data.labels)
    with torch.no_grad():
        scores = wrapper.module(Task(data.gather(s), y[s], data.gather(q), y[q], data.n_classes))
    fitted = classifier(blob_run, temperature=2.0).fit(data.gather(s), y[s])
    np.testing.assert_allclose(fitted.predict_proba(data.gather(q)), (scores.double() / 2).softmax(-1), rtol=1e-5)
    assert fitted.calibrated_ and not classifier(blob_run).fit(data.gather(s), y[s]).calibrated_


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_no_prediction_depends_on_the_other_images(batch_size):
    model = image_model()
    model.train()
    x, y = torch.randn(30, 1, 16, 16), np.arange(30) % 3
    fitted = classifier(model, preparation=GREY, batch_size=batch_size).fit(x[:6], y[:6])
    alone = np.concatenate([fitted.predict_proba(image[None]) for image in x])
    np.testing.assert_allclose(fitted.predict_proba(x), alone, rtol=1e-4)
    np.testing.assert_allclose(fitted.predict_proba(torch.cat([x[:1], 100 * x[1:]]))[0], alone[0], rtol=1e-4)
    assert model.training and model.encoder.blocks[0].norm.num_batches_tracked == 0  # the module is as it was


class MeanOfImage(nn.Module):
    """Lists the sizes of its passes."""

    def __init__(self):
        super().__init__()
        self.scale, self.passes = nn.Parameter(torch.ones(())), []

    def forward(self, x):
        self.passes.append(tuple(x.shape))
        return self.scale * torch.cat([x.mean((2, 3)), x.amax((2, 3)).square()], 1)


@pytest.mark.parametrize(("size", "at_once"), [(28, 20), (1024, 4), pytest.param(2048, 1, marks=pytest.mark.slow)])
def test_large_images_pass_a_few_at_a_time(size, at_once, tmp_path):
    encoder, preparation = MeanOfImage(), Preparation(size, 1, (0.5,), (0.5,))
    source = Source(MetricModel(encoder, PrototypicalHead()), preparation)
    for k in range(20):
        (tmp_path / f"{k % 2}").mkdir(exist_ok=True)
        Image.new("L", (8, 8), 5 * k).save(tmp_path / f"{k % 2}" / f"{k}.png")
    reader = PhotoReader(preparation, 64)
    files, embedded = embed_files(source, reader, [tmp_path], progress=False)
    fitted = classifier(source)
    rows = list(classify_files(fitted, reader, files, fit_folder(fitted, reader, tmp_path)))
    assert sorted({*map(len, rows)})[-1] == at_once and sum(map(len, rows)) == 20
    np.testing.assert_allclose(fitted.transform(files), embedded)
    pixels = torch.cat([torch.full((1, size, size, 1), 10 * k, dtype=torch.uint8) for k in range(8)])
    data = ClassDataset(pixels, torch.arange(8) // 4, mean=(0.5,), std=(0.5,))
    items = MapDataset([(data.gather([k])[0], 0) for k in range(8)], labels=[0] * 4 + [1] * 4)
    found = [evaluate_heads(source.model, some, ways=2, queries=3, episodes=3) for some in (data, items)]
    assert found[0] == found[1] and projected(source.model, data, np.arange(8)).shape == (8, 2)
    assert {n for n, *_ in encoder.passes if n > at_once} == set()
    assert (size > 1000) or (8, 1, size, size) in encoder.passes


@pytest.mark.parametrize("bytes_kept", [2**32, 0])
def test_features_too_large_to_keep_are_of_few_images_as_well(bytes_kept, monkeypatch):
    monkeypatch.setattr(episodes, "EMBED_BYTES", bytes_kept)
    monkeypatch.setattr(episodes, "EMBED_PIXELS", 3 * 16 * 16)
    encoder = MeanOfImage()
    data = ClassDataset(torch.randn(12, 1, 16, 16), torch.arange(12) // 6)
    episodes.evaluate(MetricModel(encoder, PrototypicalHead()), data, ways=2, queries=5, episodes=3)
    assert {n for n, *_ in encoder.passes} == {3} and len(encoder.passes) == (4 if bytes_kept else 13)


def test_batch_statistics_are_refused():
    model = MetricModel(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), PrototypicalHead())
    with pytest.raises(FitError, match="running statistics"):
        classifier(model).fit(np.eye(4), [0, 1, 2, 3])


def test_examples_are_embedded_once():
    seen = []
    model = image_model()
    x = torch.randn(9, 1, 16, 16)
    fitted = classifier(model).fit(x[:4], ["a", "b", "a", "b"])
    fitted.source_.model.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    fitted.partial_fit(x[4:6], ["c", "longer than the others"])
    fitted.predict(x[6:])
    assert seen == [2, 3]
    assert fitted.classes_.tolist() == ["a", "b", "c", "longer than the others"] and fitted.n_examples_ == 6
    at_once = classifier(model).fit(x[:6], ["a", "b", "a", "b", "c", "longer than the others"])
    np.testing.assert_allclose(fitted.predict_proba(x), at_once.predict_proba(x), rtol=1e-6)


def test_classes_without_examples_have_probability_0():
    fitted = classifier(VECTORS).partial_fit([[0.0], [1.0]], [3, 7], classes=[7, 5, 3])
    assert fitted.classes_.tolist() == [3, 5, 7]
    assert fitted.predict_proba([[0.1]])[0, 1] == 0 and fitted.predict([[0.1], [0.9]]).tolist() == [3, 7]
    assert fitted.partial_fit([[5.0]], [5]).predict([[4.0]]).tolist() == [5]
    with pytest.raises(L2GError, match="among the classes given"):
        classifier(VECTORS).partial_fit([[0.0]], [9], classes=[1, 2])
    with pytest.raises(L2GError, match="labels like"):
        fitted.partial_fit([[5.0]], ["five"])


@pytest.mark.parametrize(
    "labels", [["b", "a", "b"], [2, 1, 2], [True, False, True], np.array(["b", "a", "b"], object)], ids=str
)
def test_labels_of_any_type(labels):
    fitted = classifier(VECTORS).fit([[0.0], [1.0], [0.2]], labels)
    assert fitted.predict([[0.0], [1.0]]).tolist() == list(labels)[:2]
    assert fitted.score([[0.0], [1.0]], labels[:2]) == 1
    assert clone(fitted).get_params().keys() == fitted.get_params().keys()


def test_before_fit():
    with pytest.raises(NotFittedError):
        classifier(VECTORS).predict([[0.0]])


@pytest.mark.parametrize("head", [PrototypicalHead, MatchingHead, lambda: RelationHead(8, 4)], ids=["p", "m", "r"])
def test_a_class_is_not_favoured_for_more_examples(head):
    # The same image again tells nothing: (2, 4) copies are as (2, 2), and for all but sums of maps as (1, 1).
    encoder = relation_embedding(1, 8) if head not in (PrototypicalHead, MatchingHead) else Conv4(1, 8)
    model, x = image_model(head(), encoder), torch.randn(12, 1, 16, 16)
    a, b = x[:1], x[1:2]
    equal = classifier(model).fit(torch.cat([a, a, a, b, b, b]), [0, 0, 0, 1, 1, 1])
    more = classifier(model).fit(torch.cat([a, a, b, b, b, b]), [0, 0, 1, 1, 1, 1])
    np.testing.assert_allclose(equal.predict_proba(x), more.predict_proba(x), rtol=1e-4)


def test_full_context_matching_takes_unequal_numbers():
    fitted = classifier(MetricModel(nn.Flatten(), FullContextMatchingHead(2))).fit(
        np.eye(2).repeat(3, 0)[1:], list("aabbb")
    )
    assert np.allclose(fitted.predict_proba(np.eye(2)).sum(1), 1)


def test_a_model_that_adapts_is_called_with_whole_tasks():
    torch.manual_seed(0)
    model = SoftmaxMAML(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), 3, inner_lr=1.0)
    x, y = 3 * torch.eye(4)[:3], ["a", "b", "c"]
    fitted = classifier(L2GWrapper(model, 0.01), batch_size=2).fit(x, y)
    said = fitted.classify(x)
    assert said.labels.tolist() == y and said.nearest.tolist() == [-1, -1, -1]
    np.testing.assert_allclose(fitted.predict_proba(x[2:]), said.probabilities[2:], rtol=1e-4)
    with pytest.raises(FitError, match="at most 3 ways"):
        fitted.partial_fit(x[:1] + 1, ["d"]).predict(x)


def test_nearest_example():
    fitted = classifier(VECTORS).fit([[0.0], [4.0], [1.0]], ["a", "b", "a"]).partial_fit([[9.0]], ["b"])
    assert fitted.classify([[0.9], [8.0], [3.0]]).nearest.tolist() == [2, 3, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature above 0"),
        ({"batch_size": 0}, "batch_size of at least 1"),
        ({"device": "abacus"}, "cannot use --device abacus"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(L2GError, match=message):
        FewShotClassifier(VECTORS, **options).fit([[0.0], [1.0]], ["a", "b"])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 5, 5, 4), np.uint8), "1 or 3 channels"),
        (np.zeros((2, 3, 9, 9)), "need uint8 images"),
        (np.zeros((2, 16, 16, 3), np.int64), "astype"),
        (["a.txt", "b.txt"], "convert it"),
        (["none.png", "none.png"], "not there; check its path"),
        ([Image.new("I;16", (9, 9))] * 2, "8-bit images"),
        ("a.png", r"got the path 'a.png'; pass \[it\]"),
        (Image.new("RGB", (9, 9)), r"got one image; pass \[it\]"),
        (np.zeros((84, 84, 3), np.uint8), r"got one image; pass \[it\]"),
        (iter(["a.png"]), "pass a list"),
        ({"a.png"}, "pass a list"),
        (None, "pass a list"),
        (np.array([Image.new("L", (9, 9))] * 2, dtype=object), "pass a list of images, not an array"),
        ([], "at least one image"),
        (np.full((2, 3, 16, 16), np.nan, np.float32), "need images of finite numbers"),
    ],
)
def test_images_that_cannot_be_used(images, message, blob_run):
    with pytest.raises(DataError, match=message):
        classifier(blob_run).fit(images, ["a", "b"])
    grey = np.zeros((2, 9, 9), np.uint8)
    with pytest.raises(DataError, match=message):
        classifier(blob_run).fit(grey, ["a", "b"]).predict(images)


def test_models_that_cannot_be_used(tmp_path):
    with pytest.raises(L2GError, match="need a folder made by `l2g train`"):
        FewShotClassifier.load(tmp_path)
    with pytest.raises(L2GError, match="belong to timm:NAME"):
        classifier(tmp_path, weights="a.pt").fit([[0.0]], [0])
    with pytest.raises(L2GError, match="torch.nn.Module as model, got 3"):
        classifier(3).fit([[0.0]], [0])
    for pictures in ([Image.new("L", (16, 16))], np.zeros((1, 16, 16, 1), np.uint8)):
        with pytest.raises(DataError, match="preparation=Preparation"):
            classifier(image_model()).fit(pictures, [0])


def test_importing_the_package_imports_little():
    code = "import sys, l2g_meta; assert not {'torch', 'sklearn', 'torchvision', 'matplotlib'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def photos_of(blob_run):
    paths = sorted((blob_run.parent / "data" / "test").glob("*/*.png"))
    return list(map(str, paths)), [path.parent.name for path in paths]


def test_the_model_in_the_package_needs_no_training(blob_run):
    paths, y = photos_of(blob_run)
    fitted = FewShotClassifier(device="cpu").fit(paths[::2], y[::2])
    assert fitted.calibrated_ and fitted.score(paths[1::2], y[1::2]) > 0.9
    assert fitted.transform(paths).dtype == np.float32


def test_embeddings_are_those_of_the_encoder(blob_run):
    data = load("folder", "test", root=blob_run.parent / "data", image_size=16)
    fitted = classifier(blob_run, batch_size=5).fit(data.images[:13].numpy(), data.labels[:13])
    wrapper, _ = load_run(blob_run, device="cpu")
    with torch.no_grad():
        expected = wrapper.module.encoder(data.gather(range(len(data)))).flatten(1)
    np.testing.assert_allclose(fitted.transform(data.images.numpy()), expected, rtol=1e-4, atol=1e-5)
    model = SoftmaxMAML(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), 3, inner_lr=1.0)
    with pytest.raises(L2GError, match="whose encoder gives embeddings"):
        classifier(model).fit(torch.eye(4)[:3], [0, 1, 2]).transform(torch.eye(4))


def test_a_sweep_in_a_pipeline_embeds_each_photo_once(blob_run, monkeypatch):
    paths, y = photos_of(blob_run)
    seen = []
    monkeypatch.setattr(scoring, "_features", type(scoring._features)())
    monkeypatch.setattr(Conv4, "forward", counted(Conv4.forward, seen))
    encoder = FewShotClassifier(open_source(blob_run, "cpu"), device="cpu", batch_size=7)
    pipeline = make_pipeline(encoder, LogisticRegression(max_iter=1000))
    search = GridSearchCV(pipeline, {"logisticregression__C": [0.1, 1, 10]}, cv=3).fit(paths, y)
    assert search.best_score_ > 0.9 and sum(seen) == len(paths)
    other = FewShotClassifier(blob_run, device="cpu")  # the same weights, opened again
    assert cross_val_score(make_pipeline(other, LogisticRegression()), paths, y, cv=2).shape == (2,)
    assert sum(seen) == len(paths)


def counted(forward, seen):
    def forward_and_count(self, x):
        seen.append(len(x) if x.any() else 0)  # zeros are the dry run of a model that is built
        return forward(self, x)

    return forward_and_count


def test_what_is_remembered_is_bounded_and_of_one_encoder(monkeypatch):
    monkeypatch.setattr(scoring, "_features", type(scoring._features)())
    monkeypatch.setattr(scoring, "CACHE", 12)
    x = torch.arange(40.0).view(10, 4)
    twice = MetricModel(nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), PrototypicalHead())
    with torch.no_grad():
        for token, model in ((b"a", VECTORS), (b"b", twice), (b"a", VECTORS)):
            torch.testing.assert_close(scoring.embed(model, x[[0, 1, 1, 9]], token), model.encoder(x[[0, 1, 1, 9]]))
    assert len(scoring._features) == 3


def test_temperature_is_found_again():
    torch.manual_seed(1)
    scores = 3 * torch.randn(20_000, 5, dtype=torch.float64)
    y = torch.multinomial((scores / 2.5).softmax(-1), 1)[:, 0]
    t = c.fit_temperature(scores, y)
    assert t == pytest.approx(2.5, rel=0.05)
    losses = [nn.functional.cross_entropy(scores / other, y).item() for other in (t, 0.99 * t, 1.01 * t)]
    assert losses[0] == min(losses)


def test_calibration_error_of_a_calibrated_forecast_is_small():
    torch.manual_seed(0)
    confidence = torch.rand(100_000)
    assert c.expected_calibration_error(confidence, torch.rand(100_000) < confidence) < 0.01
    assert c.expected_calibration_error(torch.ones(10), torch.zeros(10, dtype=torch.bool)) == 1
    # Two bins that err in opposite directions do not cancel.
    assert c.expected_calibration_error(torch.tensor([0.9, 0.1]), torch.tensor([False, True])) == pytest.approx(0.9)


@pytest.mark.parametrize(
    "values", [{}, {"ways": 5, "episodes": 1, "shots": []}, {"ways": 5, "episodes": 1, "shots": 3}]
)
def test_damaged_calibrations(values):
    with pytest.raises(L2GError, match="need a calibration"):
        c.Calibration.from_json(values)
