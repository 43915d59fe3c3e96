"""Your own photos in five minutes: a few examples of each class in, a class for every other image out.

    python examples/classify_photos.py [--smoke]

The photos here are drawn characters, so that it runs as it is. For yours, put your folders and your model in section 1.
How often such answers are right on many draws of classes and examples is what examples/measure_photos.py prints.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from l2g_meta import FewShotClassifier
from l2g_meta.classify.exported import export
from l2g_meta.data import load
from l2g_meta.data.images import class_files
from l2g_meta.training.config import Config
from l2g_meta.training.loop import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--smoke", action="store_true", help="two updates")
smoke = parser.parse_args().smoke

# 1. Where everything is. known/<class>/*.png are the examples, new/<class>/*.png what is to be classified.
folder = Path("runs/photos-smoke" if smoke else "runs/photos")
known, new, model = folder / "known", folder / "new", folder / "model"

# 2. Photos: five letters of a script that the model will not be trained on, five examples of each and 25 others.
glyphs = load("glyphs", "test")
for rows in glyphs.index[:5]:
    name = glyphs.class_names[glyphs.labels[rows[0]]].replace("/", "-")
    for k, row in enumerate(rows):
        path = (known if k < 5 else new) / name / f"{k:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(glyphs.images[row, :, :, 0].numpy()).save(path)

# 3. A model: any run or exported folder will do. This one learns from characters of other scripts, once.
if not model.exists():
    size = {"iterations": 2, "eval_every": 2, "eval_episodes": 2} if smoke else {"iterations": 150}
    run = folder / "run"
    train(Config(method="episodic", shots=(1, 5), **size), run, resume=run.exists(), progress=False)
    export(run, model, episodes=5 if smoke else 600)

# 4. Fit: the 25 examples are embedded once. Nothing is trained.
examples = [(path, name) for name, paths in class_files(known).items() for path in paths]
paths, names = zip(*examples, strict=True)
classifier = FewShotClassifier(model).fit(paths, names)

# 5. Answers, with a probability and the example that looks most alike.
photos = [(path, name) for name, paths in class_files(new).items() for path in paths]
files, truth = zip(*photos, strict=True)
said = classifier.classify(files)
for k in range(0, len(files), 25):
    print(f"{Path(files[k]).relative_to(new)}: {said.labels[k]}, probability {said.probabilities[k].max():.2f}, "
          f"nearest example {Path(paths[said.nearest[k]]).relative_to(known)}")  # fmt: skip
print(f"right: {100 * np.mean(said.labels == np.array(truth)):.1f} % of {len(files)} (chance: 20 %)")

# 6. A sixth class, from two examples, later. The others are not embedded again.
sixth = glyphs.images[glyphs.index[5], :, :, 0].numpy()  # (30, 28, 28), as images in memory
classifier.partial_fit(list(sixth[:2]), ["sixth"] * 2)
print(f"the sixth class: {(classifier.predict(list(sixth[2:])) == 'sixth').sum()} of {len(sixth) - 2} found, "
      f"{(classifier.predict(files) == 'sixth').sum()} of {len(files)} others taken for it")  # fmt: skip
