"""The model card of an exported folder, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l2g_meta.files.names import shown


def model_card(values: Mapping[str, Any]) -> str:
    """The text of ``README.md``, from what is in ``model.json``."""
    config, calibration = values["training"]["config"], values["calibration"]
    return "\n".join(
        [
            f"# A few-shot classifier trained on {config['data']}",
            "",
            "Classifies images of classes that it was not trained on, from a few examples of each. Made by l2g-meta.",
            "",
            "```python",
            "from l2g_meta import FewShotClassifier",
            "",
            'classifier = FewShotClassifier.load("this folder")',
            'classifier.fit(["cat1.jpg", "cat2.jpg", "dog1.jpg"], ["cat", "cat", "dog"])',
            'classifier.predict(["new.jpg"])',
            "```",
            "",
            "    l2g predict --model THIS_FOLDER --support DIR --query DIR    # DIR/<class>/*.jpg",
            "",
            "## What it is worth",
            "",
            f"On {calibration['episodes']} episodes of {calibration['ways']} classes of the test split, which neither "
            "training nor the choice of the checkpoint has seen; ± is a 95% interval over episodes of this one model.",
            "",
            *_results(calibration),
            "",
            "ECE is the expected calibration error (15 bins): how far the probability of the predicted class is from "
            "how often it is right. The temperature that the scores are divided by was fitted on the validation split. "
            "For classes that are more or less alike than these, and for other numbers of classes, it will differ.",
            "",
            "## What it is",
            "",
            *_facts(values),
            "",
            "## What is in this folder",
            "",
            *_files(values),
            "",
            "## Limits",
            "",
            "It was trained on one data set at one size of image; on other kinds of images expect less. Its "
            "probabilities are shares among the classes it was given: an image of none of them gets them, too, unless "
            "`reject_rate` is set, and even then many are not noticed. The licence of the training data may restrict "
            "the use of the weights.",
            "",
            "## Training classes",
            "",
            ", ".join(_escaped(name) for name in values["classes"]),
            "",
        ]
    )


def summary(values: Mapping[str, Any]) -> list[str]:
    """What ``l2g export`` prints: a line for each number of shots and each file of the encoder."""
    lines = [
        f"{e['shots']}-shot: test {e['accuracy']:.2f} ± {e['accuracy_ci95']:.2f} %, "
        f"temperature {e['temperature']:.3f}, calibration error "
        f"{e['ece_before']:.4f} before, {e['ece_after']:.4f} after"
        for e in values["calibration"]["shots"]
    ]
    files = (values["encoder"] or {}).get("largest_difference", {})
    return lines + [
        f"{name}: read back, embeddings differ by {difference:.1e} at most, relative to the largest"
        for name, difference in files.items()
    ]


def _results(calibration: Mapping[str, Any]) -> list[str]:
    lines = [
        "| examples per class | accuracy (%) | ECE, temperature 1 | temperature | ECE with it |",
        "|---|---|---|---|---|",
    ]
    for e in calibration["shots"]:
        accuracy = f"{e['accuracy']:.2f} ± {e['accuracy_ci95']:.2f}"
        lines.append(
            f"| {e['shots']} | {accuracy} | {e['ece_before']:.4f} | {e['temperature']:.3f} | {e['ece_after']:.4f} |"
        )
    return lines


def _facts(values: Mapping[str, Any]) -> list[str]:
    training, p = values["training"], values["preparation"]
    config = training["config"]
    head = ", ".join(
        f"{name} {config[name]}"
        for name in ("distance", "dims", "temperature", "reduction")
        if config[name] is not None
    )
    how = "cropped to the central square and resized" if p["square"] else "resized (stretched)"
    rows = {
        "encoder": config["backbone"],
        "head": f"{config['head']}{f' ({head})' if head else ''}",
        "training objective": config["method"],
        "images": f"turned upright, {how} to {p['size']} × {p['size']}, {p['channels']} channel(s), divided by 255, "
        f"minus mean {_numbers(p['mean'])}, divided by std {_numbers(p['std'])}",
        "training tasks": f"{_numbers(config['ways'])} classes, {_numbers(config['shots'])} examples, "
        f"{config['queries']} queries each",
        "checkpoint": f"{training['checkpoint']}, after update {training['iteration']} of {config['iterations']}, seed "
        f"{config['seed']}",
    }
    if training["validation_accuracy"] is not None:
        rows["validation accuracy"] = f"{training['validation_accuracy']:.2f} %"
    if training["seconds"] is not None:
        rows["training time"] = f"{training['seconds']:.0f} s"
    return ["| | |", "|---|---|", *(f"| {name} | {_escaped(str(value))} |" for name, value in rows.items())]


def _files(values: Mapping[str, Any]) -> list[str]:
    lines = [
        "- `model.safetensors`: the weights.",
        "- `model.json`: architecture, preparation of images, temperatures, training classes, summary of the training.",
    ]
    if values["encoder"] is not None:
        kinds = {"encoder.pt2": "a `torch.export` program", "encoder.onnx": "ONNX"}
        size = " × ".join(map(str, values["encoder"]["input"]))
        for name, difference in values["encoder"]["largest_difference"].items():
            lines.append(
                f"- `{name}`: the encoder alone as {kinds[name]}, for any number of normalised images {size}; read "
                f"back, its embeddings differed by {difference:.0e} at most, relative to the largest."
            )
    return lines


def _numbers(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _escaped(text: str) -> str:
    """A name from somebody's folders without what Markdown would take for mark-up."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else shown(c) for c in text)
