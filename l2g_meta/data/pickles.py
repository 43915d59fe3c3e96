"""Published pickles, read without running the code a pickle can carry.

A pickle is a program for a stack machine: it may import any callable and call it. The machine here knows the
instructions for builtin values and containers; the only names it resolves are those NumPy writes for an array, and
they lead to functions of this file. Nothing else can be imported, called or given a state. Long arrays are views of the
mapped file, so that one of many gigabytes takes little memory.
"""

from __future__ import annotations

import math
import mmap
import pickle
import pickletools
import re
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from l2g_meta.data.download import is_html
from l2g_meta.errors import DataError

MAX_READS = 100_000_000  # two for an instruction; tieredImageNet's largest file takes some 14 million
KEYS = (str, bytes, int, float, np.integer, type(None))  # of dictionaries
LONG = 1024  # bytes from which data are a view of the file


def load_pickle(path: Path | str, *, max_bytes: int = 16 * 2**30) -> Any:
    """What a pickle of NumPy arrays, builtin values, lists, tuples and dictionaries holds; arrays are read-only.

    Arrays of booleans, integers, floats and strings are read, of any pickle protocol and NumPy version; text that
    Python 2 wrote is taken as Latin-1. Data of 1 kB and more are views of the mapped file, except those of protocols
    0 to 2 of Python 3. They outlive its deletion, but it must not be written to or cut off while they are used.

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
    if not 0 < (size := path.stat().st_size) <= max_bytes:
        raise DataError(f"need a pickle of 1 to at most {max_bytes} bytes, got {path} with {size}; get it again")
    if is_html(path):
        raise DataError(f"need a pickle, got {path}: this is an HTML page, a failed download; delete it, try again")
    with open(path, "rb") as file:
        try:
            value = _ArrayUnpickler(file, size).load()
            if file.read(1):
                raise ValueError("data follow its end, as in a file of two kinds")
            return value
        except Exception as error:  # a damaged stream can fail in any instruction
            refused = isinstance(error, _Refused)
            need = "NumPy arrays and builtin containers" if refused else "a complete pickle"
            got = f"{error if refused else repr(error)[:200]} in {path} ({size} bytes)"
            remedy = "do not load this file by other means, get it again from its publisher"
            raise DataError(f"need {need}, got {got}; {remedy}") from error


class _Refused(pickle.UnpicklingError):
    """The pickle asks for something that arrays do not need."""


class _Dtype:
    """Stands for a NumPy dtype, whose own ``__setstate__`` would accept any state."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[buifSU][1-9][0-9]{0,5}", code):
            raise _Refused(f"an array of dtype {_short(code)}")
        self.dtype = np.dtype(code)


def _array(raw: Any, dtype: Any, shape: Any, order: Any = "C", axes: Any = None) -> np.ndarray:
    raw = raw.encode("latin1") if isinstance(raw, str) else raw  # Python 2 wrote a string
    if not isinstance(raw, bytes | memoryview) or not isinstance(dtype, _Dtype) or not isinstance(shape, tuple):
        raise _Refused("an array without plain data")
    counts = len(shape) <= 32 and all(type(n) is int and 0 <= n < 2**48 for n in shape)
    if not counts or math.prod(shape) * dtype.dtype.itemsize != len(raw):
        raise ValueError(f"an array of {dtype.dtype} has a shape that its {len(raw)} bytes do not fit")
    if dtype.dtype.kind == "U" and len(raw) and np.frombuffer(raw, dtype.dtype.str[0] + "u4").max() > 0x10FFFF:
        raise ValueError("a text has no such character")  # NumPy would make broken texts of them
    array = np.frombuffer(raw, dtype.dtype).reshape(shape, order="C" if axes else order)
    return array.transpose(axes) if axes else array


def _encode(text: Any, encoding: Any) -> bytes:  # how protocol 2 writes bytes
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused(f"an encoding {_short(encoding)}")
    return text.encode("latin1")


def _short(value: Any) -> str:
    """For messages; what a text is, and of anything else only the type: tuples in tuples can print without end."""
    return ascii(value[:40]) if isinstance(value, str) else f"of type {type(value).__name__}"


NAMES: dict[str, Any] = {"numpy ndarray": None, "numpy dtype": _Dtype, "_codecs encode": _encode}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    NAMES[f"{_core}.multiarray _reconstruct"] = lambda subtype, shape, code: np.empty(0, np.uint8)  # BUILD follows
    NAMES[f"{_core}.multiarray scalar"] = lambda dtype, raw: _array(raw, dtype, ())[()]
    NAMES[f"{_core}.numeric _frombuffer"] = _array


class _Memo(dict[int, Any]):
    """The numbered values of a pickle; knows the number of the latest array, which may still be without data."""

    latest = -1

    def __setitem__(self, number: int, value: Any) -> None:
        self.latest = number if isinstance(value, np.ndarray) else self.latest
        super().__setitem__(number, value)


class _ArrayUnpickler(pickle._Unpickler):
    """The standard library's Python unpickler (its C one cannot guard BUILD), less most of its instructions."""

    stack: list[Any]
    pop_mark: Any

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.readline, self.reads = file, size, file.readline, 0
        super().__init__(self, encoding="latin1")
        self.memo, self.map = _Memo(), memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
        self.budget = 4 * size  # protocol 2 makes text, bytes and array of the same data

    def left(self) -> int:
        return max(0, self.size - self.file.tell())

    def read(self, n: int) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise _Refused("more instructions than any published file has")
        return self.file.read(min(n, self.left()))  # never more than there is, so that a claimed length takes no memory

    def view(self, width: int) -> bytes | memoryview:
        """The data that follow their length, of which long ones are a view of the map."""
        if (n := int.from_bytes(self.read(width), "little")) < LONG:
            return self.read(n)
        end = self.file.seek(n, 1)
        return self.map[end - n : end]

    def find_class(self, module: str, name: str) -> Any:
        if f"{module} {name}" not in NAMES:
            raise _Refused(f"a reference to {ascii(f'{module}.{name}')[1:100].rstrip(chr(39))}")
        return NAMES[f"{module} {name}"]

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack[-1]
        if not isinstance(args, tuple) or not callable(function) or function not in NAMES.values():
            raise _Refused(f"a call of {type(function).__name__} with a {type(args).__name__}")
        self.stack[-1] = self.spend(function(*args))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.ndarray):
            _, shape, dtype, fortran, raw = state
            self.stack[-1] = self.spend(_array(raw, dtype, shape, "F" if fortran else "C"))
            if self.memo.get(self.memo.latest) is target:
                self.memo[self.memo.latest] = self.stack[-1]
        elif isinstance(target, _Dtype) and type(state) is tuple and (*state[:1], *state[2:5]) == (3, None, None, None):
            target.dtype = target.dtype.newbyteorder(state[1])
        else:
            raise _Refused(f"such a state for {type(target).__name__}")

    def spend(self, made: Any) -> Any:
        self.budget -= len(made) if isinstance(made, bytes) else getattr(made, "nbytes", 0)
        if self.budget < 0:  # the same data again and again
            raise _Refused("more array data than the file has")
        return made

    def load_frame(self) -> None:  # frames say how the stream may be read, not what is in it
        if int.from_bytes(self.read(8), "little") > self.left():
            raise EOFError("a frame is longer than the file")

    def load_binstring(self) -> None:  # as Python 2 wrote text, and the data of arrays
        self.stack.append(text if isinstance(text := self.view(4), memoryview) else text.decode("latin1"))

    def load_binbytes(self) -> None:
        self.stack.append(self.view(4))

    def load_binbytes8(self) -> None:
        self.stack.append(self.view(8))

    load_bytearray8 = load_binbytes8

    def load_setitem(self) -> None:
        self.put([self.stack.pop(), self.stack.pop()][::-1])

    def load_setitems(self) -> None:
        self.put(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.put(items)

    def put(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], dict):  # NumPy would unfold what is put into an array
            raise _Refused(f"an item for a {type(self.stack[-1]).__name__}")
        for key in items[::2]:
            # Hashing tuples in tuples can take for ever; so can a dictionary whose keys, long numbers, have one hash.
            if not isinstance(key, KEYS) or (type(key) is int and abs(key) >= 2**63):
                raise _Refused(f"a dictionary key {_short(key)}")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _refuse(name: str, unpickler: _ArrayUnpickler) -> None:
    raise _Refused(f"the pickle instruction {name}")


_KNOWN = """
    PROTO FRAME STOP MARK POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE NONE NEWTRUE NEWFALSE
    INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE
    SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3
    LIST EMPTY_LIST APPEND APPENDS DICT EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD
    """.split()
_ArrayUnpickler.dispatch = {ord(opcode.code): partial(_refuse, opcode.name) for opcode in pickletools.opcodes}
for _code in (getattr(pickle, name)[0] for name in _KNOWN):  # our method, where there is one, else the library's
    _ArrayUnpickler.dispatch[_code] = getattr(_ArrayUnpickler, pickle._Unpickler.dispatch[_code].__name__)
