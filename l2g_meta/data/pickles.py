"""Published pickles, read without running the code a pickle can carry.

A pickle is a program for a stack machine: it may import any callable and call it. The machine here knows the
instructions for builtin values and containers; the only names it resolves are those NumPy writes for an array, and
they lead to the functions of ``pickled_arrays``, not to NumPy's. Nothing else can be imported, called or given a state.

The file is mapped, and arrays of some size are views of it: reading one of many gigabytes takes little memory.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from l2g_meta.data.mapped import MappedFile
from l2g_meta.data.pickled_arrays import NAMES, Dtype, Refused, array_of, short
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

    Arrays from 1 kB are read-only views of the mapped file, except those of protocols 0 to 2 of Python 3, whose text is
    decoded; so are bytes, and text of Python 2, of that length outside of arrays (``memoryview``). Views stay valid
    when the file is replaced or deleted, but it must not be written to or cut off as long as they are used.

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
    if not size:
        raise DataError(f"need a pickle, got {path}, which is empty; get it again")
    if is_html(path):
        raise DataError(f"need a pickle, got {path}: this is an HTML page, a failed download; delete it, try again")
    with open(path, "rb") as file:
        try:
            value = _ArrayUnpickler(MappedFile(file, size)).load()
            if file.read(1):
                raise ValueError("data follow its end, as in a file of two kinds")
            return value
        except Refused as error:
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

    NumPy alone would unfold nested lists, of which a short pickle can describe astronomically many. An array comes
    back as it is, which may be a read-only view of the file.

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
        if number is not None and self.get(number) is empty:  # else the id is that of an array that is gone
            super().__setitem__(number, array)


class _Dispatch(dict[int, Callable[[Any], None]]):
    left = MAX_INSTRUCTIONS

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise Refused("more instructions than any published file has")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Callable[[Any], None]:
        name = {opcode.code: opcode.name for opcode in pickletools.opcodes}.get(chr(code))
        raise Refused(f"the pickle instruction {name}") if name else ValueError(f"no pickle instruction is {code}")


class _ArrayUnpickler(pickle._Unpickler):
    """The standard library's Python unpickler (its C one cannot guard BUILD), less most of its instructions."""

    dispatch = {code: pickle._Unpickler.dispatch[code] for code in _INSTRUCTIONS}
    read: Callable[[int], bytes]
    stack: list[Any]
    memo: _Memo
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: MappedFile) -> None:
        super().__init__(file, encoding="latin1")
        self.file, self.memo = file, _Memo()
        self.dispatch = _Dispatch(type(self).dispatch)  # type: ignore[misc]  # it counts, so one for each file
        self.budget = 4 * file.size  # protocol 2 makes text, bytes and array of the same data

    def find_class(self, module: str, name: str) -> Any:
        if f"{module} {name}" not in NAMES:
            raise Refused(f"a reference to {ascii(f'{module}.{name}')[1:100].rstrip(chr(39))}")
        return NAMES[f"{module} {name}"]

    def load_reduce(self) -> None:
        args, function = self.stack.pop(), self.stack[-1]
        if not callable(function) or function not in NAMES.values():
            raise Refused(f"a call of {type(function).__name__}")
        if not isinstance(args, tuple):  # from long bytes Python would make one
            raise Refused(f"a call with a {type(args).__name__}")
        self.stack[-1] = self.spend(function(*args))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.ndarray):
            version, shape, dtype, fortran, raw = state
            raw, dtype, shape = array_of(raw, dtype, shape)
            if isinstance(raw, memoryview):
                array = np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")
                self.memo.replace(target, array)
                self.stack[-1] = array
            else:
                target.__setstate__((1, shape, dtype, bool(fortran), raw))
            self.spend(self.stack[-1])
        elif isinstance(target, Dtype):
            target.build(state)
        else:
            raise Refused(f"a state for {type(target).__name__}")

    def spend(self, made: Any) -> Any:
        self.budget -= len(made) if isinstance(made, bytes) else getattr(made, "nbytes", 0)
        if self.budget < 0:  # the same data again and again
            raise Refused("more array data than the file has")
        return made

    def load_frame(self) -> None:  # frames say how the stream may be read, not what is in it
        self.file.check(int.from_bytes(self.read(8), "little"))

    def load_binstring(self) -> None:  # as Python 2 wrote text, and the data of arrays
        text = self.file.view(int.from_bytes(self.read(4), "little"))
        self.stack.append(text.decode("latin1") if isinstance(text, bytes) else text)

    def load_binbytes(self) -> None:
        self.stack.append(self.file.view(int.from_bytes(self.read(4), "little")))

    def load_binbytes8(self) -> None:
        self.stack.append(self.file.view(int.from_bytes(self.read(8), "little")))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        if not isinstance(self.stack[-1], dict):  # NumPy would unfold what is put into an array
            raise Refused(f"an item for a {type(self.stack[-1]).__name__}")
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
            "FRAME": load_frame,
            "BINSTRING": load_binstring,
            "BINBYTES": load_binbytes,
            "BINBYTES8": load_binbytes8,
            "BYTEARRAY8": load_binbytes8,
            "SETITEM": load_setitem,
            "SETITEMS": load_setitems,
            "DICT": load_dict,
        }.items()
    }


def _key(key: Any) -> Any:
    # Hashing tuples in tuples can take for ever; so can a dictionary whose keys, long integers, have one hash.
    if not isinstance(key, str | bytes | int | float | np.generic | None) or (type(key) is int and abs(key) >= 2**63):
        raise Refused(f"a dictionary key {short(key)}")
    return key
