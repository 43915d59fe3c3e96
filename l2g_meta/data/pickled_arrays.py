"""What a pickled array may call: functions of this file, in place of those of NumPy whose names it gives."""

from __future__ import annotations

import math
import pickle
import re
import sys
from typing import Any

import numpy as np


class Refused(pickle.UnpicklingError):
    """The pickle asks for something that arrays do not need."""


class Dtype:
    """Stands for a NumPy dtype, whose own ``__setstate__`` would accept any state."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[buifSU][1-9][0-9]{0,5}", code):
            raise Refused(f"an array of dtype {short(code)}")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        """Takes the byte order of the state that NumPy wrote; there may be no other."""
        if not isinstance(state, tuple) or len(state) != 8:
            raise Refused("an array of unknown dtype")
        version, order, *fields = state[:5]
        if version != 3 or order not in ("<", ">", "|", "=") or fields != [None, None, None]:
            raise Refused("an array of structured dtype")
        self.dtype = self.dtype.newbyteorder(order)


def array_of(raw: Any, dtype: Any, shape: Any) -> tuple[bytes | memoryview, np.dtype, tuple[int, ...]]:
    """The data, type and shape of an array, where they fit each other."""
    raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 wrote a string
    if not isinstance(raw, bytes | memoryview) or not isinstance(dtype, Dtype) or not isinstance(shape, tuple):
        raise Refused("an array without plain data")
    if len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ValueError("an array has no such shape")
    if math.prod(shape) * dtype.dtype.itemsize != len(raw):
        raise ValueError(f"an array of shape {shape} and {dtype.dtype} does not fit its {len(raw)} bytes")
    if dtype.dtype.kind == "U" and len(raw):
        if np.frombuffer(raw, dtype.dtype.str[0] + "u4").max() > sys.maxunicode:
            raise ValueError("a text has no such character")  # NumPy would make broken texts of them
    return raw, dtype.dtype, shape


def short(value: Any) -> str:
    """For messages; what a text is, and of anything else only the type: tuples in tuples can print without end."""
    return ascii(value[:40]) if isinstance(value, str) else f"of type {type(value).__name__}"


def _reconstruct(subtype: Any, shape: Any, code: Any) -> np.ndarray:
    return np.empty(0, np.uint8)  # BUILD, which follows, gives it shape, dtype and data


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
    raw, dtype, shape = array_of(raw, dtype, shape)
    array = np.frombuffer(raw, dtype).reshape(shape, order="C" if axes else order)
    return array.transpose(axes) if axes else array


def _scalar(dtype: Any, raw: Any) -> Any:
    return _frombuffer(raw, dtype, (), "C")[()]


def _encode(text: Any, encoding: Any) -> bytes:  # how protocol 2 writes bytes
    if not isinstance(text, str) or encoding != "latin1":
        raise Refused(f"an encoding {short(encoding)}")
    return text.encode("latin1")


NAMES: dict[str, Any] = {"numpy ndarray": None, "numpy dtype": Dtype, "_codecs encode": _encode}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    NAMES[f"{_core}.multiarray _reconstruct"] = _reconstruct
    NAMES[f"{_core}.multiarray scalar"] = _scalar
    NAMES[f"{_core}.numeric _frombuffer"] = _frombuffer
