"""Convolution and norms as pure functions with an exact, fast double backward.

No GPU has run them yet: on CUDA, PyTorch's own operators run unless ``L2G_FAST_CUDA=1`` is set. ``make gpu`` sets it.
This module reads the variable once, when it is imported.
"""

import os

DEVICES = ("cpu", "cuda") if os.environ.get("L2G_FAST_CUDA") == "1" else ("cpu",)
