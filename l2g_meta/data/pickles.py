"""Published pickles, read without running the code a pickle can carry.

A pickle is a program for a stack machine: it may import any callable and call it. The machine here knows the
instructions for builtin values and containers; the only names it resolves are those NumPy writes for an array, and
they lead to the functions of this file, not to NumPy's. Nothing else can be imported, called or given a state.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from l2g_meta.errors import DataError

_INSTRUCTIONS = [
    getattr(pickle, name)[0]
    for name in """
    PROTO FRAME STOP MARK POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
    TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 LIST EMPTY_LIST APPEND APPENDS DICT EMPTY_DICT SETITEM SETITEMS
    GLOBAL STACK_GLOBAL
    """.split()
]
MAX_INSTRUCTIONS = 50_000_000  # tieredImageNet's largest file has some 13 million; one byte can claim 64 of memory


def load_pickle(path: Path | str, *, max_bytes: int = 16 * 2**30) -> Any:
    """What a pickle of NumPy arrays, builtin values, lists, tuples and dictionaries holds.

    Arrays of booleans, integers, floats and strings are read, of any pickle protocol and NumPy version; text that
    Python 2 wrote is taken as Latin-1. No array or string is allocated that is larger than the file.

    Args:
        path: the file.
        max_bytes: largest file that is opened.

    Raises:
        DataError: if the file is missing, too large, damaged, an HTML page, goes on after its end, or refers to
            anything but arrays.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "some.pkl"
        >>> _ = path.write_bytes(pickle.dumps({"label": np.arange(3)}))
        >>> load_pickle(path)
        {'label': array([0, 1, 2])}
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"need a pickle, got {path}, which is not a file; check the path")
    if (size := path.stat().st_size) > max_bytes:
        raise DataError(f"need a pickle of at most {max_bytes} bytes, got {path} with {size}; raise max_bytes")
    if is_html(path):
        raise DataError(f"need a pickle, got {path}: this is an HTML page, a failed download; delete it, try again")
    with open(path, "rb") as file:
        try:
            value = _ArrayUnpickler(_Bounded(file, size)).load()
            if file.read(1):
                raise ValueError("data follow its end, as in a file of two kinds")
            return value
        except _Refused as error:
            raise DataError(
                f"need NumPy arrays and builtin containers, got {error} in {path}; "
                "do not load this file by other means, get it again from its publisher"
            ) from error
        except Exception as error:  # a damaged stream can fail in any instruction
            raise DataError(
                f"need a complete pickle, got {path} ({size} bytes), which is damaged or not a pickle "
                f"({type(error).__name__}: {str(error)[:200]}); get it again"
            ) from error


def is_html(path: Path) -> bool:
    """Whether a file starts like an HTML or XML page, as no pickle does."""
    with open(path, "rb") as file:
        return file.read(512).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<")


def check_pickle(path: Path) -> None:
    """Whether a file begins and ends as a pickle does, without reading it.

    Raises:
        DataError: if not.
    """
    with open(path, "rb") as file:
        first = file.read(1)
        file.seek(max(0, path.stat().st_size - 1))
        last = file.read(1)
    if is_html(path):
        raise DataError("an HTML page, no pickle")
    if first not in (b"\x80", b"(", b"c", b"]", b"}", b"l", b"d") or last != pickle.STOP:
        raise DataError("no pickle, or a part of one")


def integers(value: Any) -> np.ndarray | None:
    """A list or array of integers as an array (n,), ``None`` for anything else.

    NumPy alone would unfold nested lists, of which a short pickle can describe astronomically many.

    Example:
        >>> integers([3, 1]), integers([[3], [1]]), integers([0.5])
        (array([3, 1]), None, None)
    """
    if isinstance(value, list) and all(isinstance(n, int | np.integer) for n in value):
        try:
            value = np.array(value, dtype=np.int64)
        except OverflowError:
            return None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or value.ndim != 1:
        return None
    return value


class _Refused(pickle.UnpicklingError):
    """The pickle asks for something that arrays do not need."""


class _Bounded:
    """A file that reads no more than it has: a length claimed by the stream is checked before memory is taken."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.readline = file, size, file.readline

    def read(self, n: int) -> bytes:
        if n > 65536 and n > self.size - self.file.tell():
            raise EOFError(f"{n} bytes are claimed, the file ends before")
        return self.file.read(n)


class _Dispatch(dict[int, Callable[[Any], None]]):
    left = MAX_INSTRUCTIONS

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise _Refused("more instructions than any published file has")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Callable[[Any], None]:
        name = {opcode.code: opcode.name for opcode in pickletools.opcodes}.get(chr(code))
        raise _Refused(f"the pickle instruction {name}") if name else ValueError(f"no pickle instruction is {code}")


class _Dtype:
    """Stands for a NumPy dtype, whose own ``__setstate__`` would accept any state."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[buifSU][1-9][0-9]{0,5}", code):
            raise _Refused(f"an array of dtype {_short(code)}")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        version, order, *rest = state
        if version != 3 or order not in ("<", ">", "|", "=") or rest[:3] != [None, None, None] or len(rest) != 6:
            raise _Refused("an array of structured dtype")
        self.dtype = self.dtype.newbyteorder(order)


def _array_of(raw: Any, dtype: Any, shape: Any) -> tuple[bytes, np.dtype, tuple[int, ...]]:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 wrote a string
    if not isinstance(raw, bytes) or not isinstance(dtype, _Dtype) or not isinstance(shape, tuple):
        raise _Refused("an array without plain data")
    if len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ValueError("an array has no such shape")
    if math.prod(shape) * dtype.dtype.itemsize != len(raw):
        raise ValueError(f"an array of shape {shape} and {dtype.dtype} does not fit its {len(raw)} bytes")
    return raw, dtype.dtype, shape


def _short(value: Any) -> str:
    """For messages; what a text is, and of anything else only the type: tuples in tuples can print without end."""
    return ascii(value[:40]) if isinstance(value, str) else f"of type {type(value).__name__}"


def _reconstruct(subtype: Any, shape: Any, code: Any) -> np.ndarray:
    return np.empty(0, np.uint8)  # BUILD, which follows, gives it shape, dtype and data


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
    raw, dtype, shape = _array_of(raw, dtype, shape)
    array = np.frombuffer(raw, dtype).reshape(shape, order="C" if axes else order)
    return array.transpose(axes) if axes else array


def _scalar(dtype: Any, raw: Any) -> Any:
    return _frombuffer(raw, dtype, (), "C")[()]


def _encode(text: Any, encoding: Any) -> bytes:  # how protocol 2 writes bytes
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused(f"an encoding {_short(encoding)}")
    return text.encode("latin1")


_NAMES: dict[str, Any] = {"numpy ndarray": None, "numpy dtype": _Dtype, "_codecs encode": _encode}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _NAMES[f"{_core}.multiarray _reconstruct"] = _reconstruct
    _NAMES[f"{_core}.multiarray scalar"] = _scalar
    _NAMES[f"{_core}.numeric _frombuffer"] = _frombuffer


class _ArrayUnpickler(pickle._Unpickler):
    """The standard library's Python unpickler (its C one cannot guard BUILD), less most of its instructions."""

    dispatch = {code: pickle._Unpickler.dispatch[code] for code in _INSTRUCTIONS}
    read: Callable[[int], bytes]
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: _Bounded) -> None:
        super().__init__(file, encoding="latin1")
        self.dispatch = _Dispatch(type(self).dispatch)  # type: ignore[misc]  # it counts, so one for each file
        self.budget = 4 * file.size  # protocol 2 makes text, bytes and array of the same data

    def find_class(self, module: str, name: str) -> Any:
        if f"{module} {name}" not in _NAMES:
            raise _Refused(f"a reference to {ascii(f'{module}.{name}')[1:100].rstrip(chr(39))}")
        return _NAMES[f"{module} {name}"]

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack[-1]
        if not callable(function) or function not in _NAMES.values():
            raise _Refused(f"a call of {type(function).__name__}")
        self.stack[-1] = self.spend(function(*args))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.ndarray):
            version, shape, dtype, fortran, raw = state
            raw, dtype, shape = _array_of(raw, dtype, shape)
            target.__setstate__((1, shape, dtype, bool(fortran), raw))
            self.spend(target)
        elif isinstance(target, _Dtype):
            target.build(state)
        else:
            raise _Refused(f"a state for {type(target).__name__}")

    def spend(self, made: Any) -> Any:
        self.budget -= len(made) if isinstance(made, bytes) else getattr(made, "nbytes", 0)
        if self.budget < 0:  # the same data again and again
            raise _Refused("more array data than the file has")
        return made

    def load_bytearray8(self) -> None:
        self.stack.append(self.read(int.from_bytes(self.read(8), "little")))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append(dict(zip(map(_key, items[::2]), items[1::2], strict=True)))

    dispatch |= {
        getattr(pickle, name)[0]: function
        for name, function in {
            "REDUCE": load_reduce,
            "BUILD": load_build,
            "BYTEARRAY8": load_bytearray8,
            "SETITEM": load_setitem,
            "SETITEMS": load_setitems,
            "DICT": load_dict,
        }.items()
    }


def _key(key: Any) -> Any:
    if not isinstance(key, str | bytes | int | float | np.generic | None):  # hashing tuples in tuples can take for ever
        raise _Refused(f"a dictionary key {_short(key)}")
    return key
