"""Published pickles, read without running the code a pickle can carry.

A pickle is a program for a stack machine: it may import any callable and call it. The machine here knows the
instructions for builtin values and containers; the only names it resolves are those NumPy writes for an array, and
they lead to the functions of this file, not to NumPy's. Nothing else can be imported, called or given a state.

The file is mapped, and arrays of some size are views of it: reading one of many gigabytes takes little memory.
"""

from __future__ import annotations

import math
import mmap
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from l2g_meta.data.pages import give_back
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
VIEWED = 1024  # bytes from which a string of bytes is a view of the file
RESIDENT = 2**28  # bytes of the file that are resident while it is read


def load_pickle(path: Path | str, *, max_bytes: int = 40 * 2**30) -> Any:
    """What a pickle of NumPy arrays, builtin values, lists, tuples and dictionaries holds.

    Arrays of booleans, integers, floats and strings are read, of any pickle protocol and NumPy version; text that
    Python 2 wrote is taken as Latin-1. No array or string is allocated that is larger than the file. Arrays from 1 kB
    are read-only views of the mapped file, except those of protocols 0 to 2 of Python 3, whose text is decoded; so are
    bytes of that length outside of arrays (``memoryview``).

    Args:
        path: the file.
        max_bytes: largest file that is opened.

    Raises:
        DataError: if the file is missing, too large, damaged, an HTML page, or refers to anything but arrays.

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
            return _ArrayUnpickler(_Mapped(file)).load()
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


class _Refused(pickle.UnpicklingError):
    """The pickle asks for something that arrays do not need."""


class _Mapped:
    """A file that reads no more than it has: a length claimed by the stream is checked before memory is taken."""

    def __init__(self, file: BinaryIO) -> None:
        self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.size, self.readline, self.bytes = len(self.map), self.map.readline, memoryview(self.map)

    def read(self, n: int) -> bytes:
        self.check(n)
        return self.map.read(n)

    def view(self, n: int) -> bytes | memoryview:
        """As ``read``, without a copy of what is long."""
        if n < VIEWED:
            return self.read(n)
        self.check(n)
        start = self.map.tell()
        self.map.seek(n, 1)
        if start // RESIDENT != (start + n) // RESIDENT:
            give_back(self.bytes)
        return self.bytes[start : start + n]

    def check(self, n: int) -> None:
        if n > self.size - self.map.tell():
            raise EOFError(f"{n} bytes are claimed, the file ends before")


class _Memo(dict[int, Any]):
    """The numbered values of a pickle; knows the number of an array that is still without data."""

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}

    def __setitem__(self, number: int, value: Any) -> None:
        if isinstance(value, np.ndarray):
            self.numbers[id(value)] = number
        super().__setitem__(number, value)

    def replace(self, empty: np.ndarray, array: np.ndarray) -> None:
        number = self.numbers.pop(id(empty), None)
        if number is not None and self.get(number) is empty:
            super().__setitem__(number, array)


class _Dispatch(dict[int, Callable[[Any], None]]):
    def __missing__(self, code: int) -> Callable[[Any], None]:
        name = {opcode.code: opcode.name for opcode in pickletools.opcodes}.get(chr(code))
        raise _Refused(f"the pickle instruction {name}") if name else ValueError(f"no pickle instruction is {code}")


class _Dtype:
    """Stands for a NumPy dtype, whose own ``__setstate__`` would accept any state."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[buifSU][1-9][0-9]{0,8}", code):
            raise _Refused(f"an array of dtype {str(code)[:40]!r}")
        self.dtype = np.dtype(code)

    def build(self, state: Any) -> None:
        version, order, *rest = state
        if version != 3 or order not in ("<", ">", "|", "=") or rest[:3] != [None, None, None] or len(rest) != 6:
            raise _Refused("an array of structured dtype")
        self.dtype = self.dtype.newbyteorder(order)


def _array_of(raw: Any, dtype: Any, shape: Any) -> tuple[bytes | memoryview, np.dtype, tuple[int, ...]]:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 wrote a string
    if not isinstance(raw, bytes | memoryview) or not isinstance(dtype, _Dtype) or not isinstance(shape, tuple):
        raise _Refused("an array without plain data")
    if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) * dtype.dtype.itemsize != len(raw):
        raise ValueError(f"an array of shape {shape} and {dtype.dtype} does not fit its {len(raw)} bytes")
    return raw, dtype.dtype, shape


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
        raise _Refused(f"an encoding {encoding!r}")
    return text.encode("latin1")


_NAMES: dict[str, Any] = {"numpy ndarray": None, "numpy dtype": _Dtype, "_codecs encode": _encode}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _NAMES[f"{_core}.multiarray _reconstruct"] = _reconstruct
    _NAMES[f"{_core}.multiarray scalar"] = _scalar
    _NAMES[f"{_core}.numeric _frombuffer"] = _frombuffer


class _ArrayUnpickler(pickle._Unpickler):
    """The standard library's Python unpickler (its C one cannot guard BUILD), less most of its instructions."""

    dispatch = _Dispatch({code: pickle._Unpickler.dispatch[code] for code in _INSTRUCTIONS})
    read: Callable[[int], bytes]
    stack: list[Any]
    memo: _Memo

    def __init__(self, file: _Mapped) -> None:
        super().__init__(file, encoding="latin1")
        self.file, self.memo = file, _Memo()
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
            if isinstance(raw, memoryview):
                array = np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")
                self.memo.replace(target, array)
                self.stack[-1] = array
            else:
                target.__setstate__((1, shape, dtype, bool(fortran), raw))
            self.spend(self.stack[-1])
        elif isinstance(target, _Dtype):
            target.build(state)
        else:
            raise _Refused(f"a state for {type(target).__name__}")

    def spend(self, made: Any) -> Any:
        self.budget -= len(made) if isinstance(made, bytes) else getattr(made, "nbytes", 0)
        if self.budget < 0:  # the same data again and again
            raise _Refused("more array data than the file has")
        return made

    def load_frame(self) -> None:  # frames say how the stream may be read, not what is in it
        self.file.check(int.from_bytes(self.read(8), "little"))

    def load_binbytes(self) -> None:
        self.stack.append(self.file.view(int.from_bytes(self.read(4), "little")))

    def load_binstring(self) -> None:  # as Python 2 wrote text, and the data of arrays
        text = self.file.view(int.from_bytes(self.read(4), "little"))
        self.stack.append(text.decode("latin1") if isinstance(text, bytes) else text)

    def load_binbytes8(self) -> None:
        self.stack.append(self.file.view(int.from_bytes(self.read(8), "little")))

    dispatch.update({pickle.REDUCE[0]: load_reduce, pickle.BUILD[0]: load_build, pickle.FRAME[0]: load_frame})
    dispatch.update({pickle.BINBYTES[0]: load_binbytes, pickle.BINSTRING[0]: load_binstring})
    dispatch.update({pickle.BINBYTES8[0]: load_binbytes8, pickle.BYTEARRAY8[0]: load_binbytes8})
