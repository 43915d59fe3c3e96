"""Published pickles are read; a pickle that asks for anything but arrays is refused before it acts."""

from __future__ import annotations

import copyreg
import functools
import gc
import os
import pickle
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from l2g_meta.data import pickles
from l2g_meta.data.dataset import integers
from l2g_meta.data.pickles import load_pickle
from l2g_meta.data.sets import mini_imagenet, tiered_imagenet
from l2g_meta.errors import DataError

U8 = b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1I00\nI01\ntR"  # protocol 0 and 1 instructions, readable with pickletools.dis
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntC\x01btR"
ARRAYS = {
    "uint8": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    "large": np.arange(77_000, dtype=np.uint32).astype(np.uint8),
    "high bytes": np.full(77_000, 255, np.uint8),
    "int64": np.arange(3),
    "float32": np.linspace(0, 1, 5, dtype=np.float32),
    "big-endian": np.arange(3, dtype=">i4"),
    "bool": np.array([True, False]),
    "text": np.array(["n01", "n0234"]),
    "bytes": np.array([b"ab", b"c"]),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "transposed": np.arange(24).reshape(2, 3, 4).transpose(0, 2, 1),
    "0-d": np.array(7),
    "scalar": np.int64(7),
}


class Call:
    """Pickles as the call of a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def write(folder: Path, data: bytes) -> Path:
    path = folder / "some.pkl"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_come_back(tmp_path: Path, name: str, protocol: int) -> None:
    value = {"x": ARRAYS[name], "list": [1, -(2**70), 0.5, None, True, "ü", (1, 2)]}
    got = load_pickle(write(tmp_path, pickle.dumps(value, protocol=protocol)))
    assert got["list"] == value["list"]
    assert type(got["x"]) is type(value["x"]) and got["x"].dtype.name == value["x"].dtype.name  # of any byte order
    np.testing.assert_array_equal(got["x"], value["x"])


@pytest.mark.parametrize("core", [b"numpy.core.", b"numpy._core."])
def test_numpy_1_and_2_names(tmp_path: Path, core: bytes) -> None:
    data = pickle.dumps([np.arange(3), np.float32(2)], protocol=2)
    data = data.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", core)
    array, scalar = load_pickle(write(tmp_path, data))
    assert array.tolist() == [0, 1, 2] and scalar == 2


def test_python_2_pickle(tmp_path: Path) -> None:
    data = (
        b"\x80\x02}q\x00U\x0elabel_specificq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03"
        b"K\x00\x85U\x01b\x87R(K\x01K\x03\x85cnumpy\ndtype\nU\x02i2K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89U\x06\x01\x00\xff\x00\x02\x00tbs."
    )
    assert load_pickle(write(tmp_path, data))["label_specific"].tolist() == [1, 255, 2]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_long_arrays_are_views_of_the_file_and_stay_the_same_object(tmp_path: Path, protocol: int) -> None:
    array, grey = np.arange(6000, dtype=np.uint8), np.asfortranarray(np.arange(4000, dtype=np.int32).reshape(40, 100))
    value = {"first": array, "again": [array, array[:2000]], "grey": grey, "again grey": grey}
    got = load_pickle(write(tmp_path, pickle.dumps(value, protocol=protocol)))
    assert got["first"] is got["again"][0] and got["grey"] is got["again grey"]
    assert not got["first"].flags.writeable and not got["first"].flags.owndata
    np.testing.assert_array_equal(got["again"][1], array[:2000])
    np.testing.assert_array_equal(got["grey"], grey)


@pytest.mark.parametrize("n", [700, 70_000])
def test_python_2_strings_of_any_length(tmp_path: Path, n: int) -> None:
    raw = bytes(range(256)) * (n // 256) + bytes(n % 256)
    text = b"T" + (500).to_bytes(4, "little") + 500 * b"\xe4"
    array = ARRAY + b"(I1\n(I" + str(n).encode() + b"\nt" + U8 + b"I00\nT" + n.to_bytes(4, "little") + raw + b"tb"
    got = load_pickle(write(tmp_path, b"\x80\x02(lp0\n" + array + b"a" + text + b"a."))
    assert got[0].tobytes() == raw and got[0].dtype == np.uint8 and got[1] == 500 * "ä"


def test_views_outlive_the_file(tmp_path: Path) -> None:
    value = {"pixels": np.arange(9000, dtype=np.uint16), "raw": bytes(range(250)) * 40}
    path = write(tmp_path, pickle.dumps(value))
    got = load_pickle(path)
    (tmp_path / "new").write_bytes(b"other")
    (tmp_path / "new").replace(path)
    path.unlink()
    gc.collect()
    np.testing.assert_array_equal(got["pixels"], value["pixels"])
    assert isinstance(got["raw"], memoryview) and got["raw"].readonly and got["raw"] == value["raw"]
    with pytest.raises(ValueError, match="read-only"):
        got["pixels"][0] = 1


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, bytes(200_000))
    with open(path, "rb") as opened:
        unpickler = pickles._ArrayUnpickler(opened, 200_000)
        assert unpickler.read(3) == bytes(3)
        os.truncate(path, 100_000)
        assert len(unpickler.map[:150_000]) == 150_000  # not looked at, as when a pickle is read
        assert unpickler.read(40_000) == bytes(40_000) and unpickler.read(150_000) == bytes(99_997 - 40_000)
        assert unpickler.read(1) == b""  # its end, and no error of the system


def test_a_second_state_of_an_array(tmp_path: Path) -> None:
    raw = b"B" + (2000).to_bytes(4, "little") + bytes(2000)
    long, brief = (b"(I1\n(I%d\nt" % n + U8 + b"I00\n" + data + b"tb" for n, data in ((2000, raw), (3, b"C\x03abc")))
    for states, n in ((long + brief, 3), (brief + long, 2000), (long + long, 2000)):
        array, again = load_pickle(write(tmp_path, b"\x80\x03(lp0\n" + ARRAY + b"p1\n" + states + b"ag1\na."))
        assert len(array) == n and again.dtype == np.uint8


def object_state(dtype: bytes) -> bytes:
    """An innocent array that is then given a state with another dtype."""
    return ARRAY + b"(I1\n(I1\nt" + dtype + b"I00\n(lp9\nI1\natb."


def nested(depth: int) -> bytes:
    """A tuple of two tuples of two tuples …, each stored once: to hash, compare or print it takes 2^depth steps."""
    return b")" + b"".join(b"p%d\n0(g%d\ng%d\nt" % (i, i, i) for i in range(depth))


HOSTILE = {
    "os.system": lambda s: pickle.dumps(Call(os.system, f"touch {s}")),
    "builtins.eval": lambda s: pickle.dumps(Call(eval, f"open({s!r}, 'w')")),
    "builtins.exec, protocol 0": lambda s: pickle.dumps(Call(exec, f"open({s!r}, 'w')"), protocol=0),
    "nested": lambda s: pickle.dumps({"image_data": [(1, Call(len, Call(eval, f"open({s!r}, 'w')")))]}),
    "dotted name": lambda s: b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
    "dotted module": lambda s: b"\x80\x04\x8c\x02os\x8c\x0bpath.os.abc\x93.",
    "numpy.load": lambda s: b"cnumpy\nload\n(V" + s.encode() + b"\ntR.",
    "numpy.save": lambda s: b"cnumpy\nsave\n(V" + s.encode() + b"\nI1\ntR.",
    "numpy.testing": lambda s: b"cnumpy.testing._private.utils\nrunstring\n(V1\n(dtR.",
    "numpy.core.multiarray.fromfile": lambda s: b"cnumpy.core.multiarray\nfromfile\n(V" + s.encode() + b"\ntR.",
    "functools.partial": lambda s: pickle.dumps(functools.partial(os.system, f"touch {s}")),
    "copyreg._reconstructor": lambda s: pickle.dumps(Call(copyreg._reconstructor, dict, object, None)),
    "a class": lambda s: pickle.dumps(Path(s)),
    "OrderedDict": lambda s: pickle.dumps(OrderedDict(a=1)),
    "complex": lambda s: pickle.dumps(1j),
    "object array": lambda s: pickle.dumps(np.array([Call(eval, f"open({s!r}, 'w')")], dtype=object)),
    "plain object array": lambda s: pickle.dumps(np.array([1, None], dtype=object)),
    "structured array": lambda s: pickle.dumps(np.zeros(2, dtype=[("a", "O"), ("b", "i4")])),
    "object dtype by state": lambda s: object_state(b"cnumpy\ndtype\n(VO8\nI00\nI01\ntR"),
    "fields by state": lambda s: object_state(U8 + b"(I3\nV|\nN(Va\nt(dVa\nNsI8\nI8\nI63\ntb"),
    "metadata by state": lambda s: object_state(U8 + b"(I4\nV|\nNNNI-1\nI-1\nI0\n(dtb"),
    "state of a function": lambda s: b"cnumpy.core.multiarray\n_reconstruct\n(N(dV__name__\nVx\nstb.",
    "state of a dict": lambda s: b"(d(dV__class__\nVx\nsb.",
    "call of an array type": lambda s: b"cnumpy\nndarray\n(I9\ntR.",
    "call of text": lambda s: b"Vos.system\n(Vls\ntR.",
    "other codec": lambda s: b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
    "persistent id": lambda s: b"Psome\n.",
    "binary persistent id": lambda s: b"Vsome\nQ.",
    "INST": lambda s: b"(Vtouch " + s.encode() + b"\nios\nsystem\n.",
    "OBJ": lambda s: b"(cnumpy\ndtype\nVu1\no.",
    "NEWOBJ": lambda s: b"\x80\x02cnumpy\ndtype\n)\x81.",
    "extension registry": lambda s: b"\x80\x02\x82\x01.",
    "out-of-band buffer": lambda s: b"\x80\x05\x97.",
    "a set": lambda s: pickle.dumps({1, 2}),
    "__reduce__ within __reduce__": lambda s: pickle.dumps(Call(Call, Call(os.system, f"touch {s}"))),
    "getattr": lambda s: b"cbuiltins\ngetattr\n(cos\npath\nVsystem\ntR.",
    "__import__": lambda s: b"cbuiltins\n__import__\n(Vos\ntR.",
    "torch tensor": lambda s: pickle.dumps(torch.ones(2)),
    "numpy.ndarray by attribute": lambda s: (
        b"\x80\x04\x8c\x15numpy.core.multiarray\x8c\x18_reconstruct.__globals__\x93."
    ),
    "length beyond what NumPy counts": lambda s: object_state(b"cnumpy\ndtype\n(VU999999999\nI00\nI01\ntR"),
    "tuples in tuples as a key": lambda s: b"}" + nested(60) + b"Ns.",
    "tuples in tuples as a codec": lambda s: b"c_codecs\nencode\n(Vabc\n" + nested(60) + b"tR.",
    "tuples in tuples as a dtype": lambda s: b"cnumpy\ndtype\n(" + nested(60) + b"tR.",
    "tuples in tuples put into an array": lambda s: (
        ARRAY + b"(I1\n(I3\nt" + U8 + b"I00\nC\x03abctbN" + nested(60) + b"s."
    ),
    "long bytes as arguments": lambda s: (
        b"\x80\x03cnumpy\ndtype\nB" + (2000).to_bytes(4, "little") + bytes(2000) + b"R."
    ),
    "long bytes as a dtype's state": lambda s: (
        b"\x80\x03" + U8 + b"B" + (2000).to_bytes(4, "little") + bytes(2000) + b"b."
    ),
    "long integers of one hash as keys": lambda s: pickle.dumps({k * (2**61 - 1): None for k in range(9)}),
    "long floats of one hash as keys": lambda s: pickle.dumps({np.longdouble(k): None for k in range(9)}, 2),
    "long bytes as a key": lambda s: pickle.dumps({bytes(2000): 1}),
    "a view many times": lambda s: (
        b"\x80\x03(lp0\nB"
        + (2000).to_bytes(4, "little")
        + bytes(2000)
        + b"p1\na"
        + 99 * (ARRAY + b"(I1\n(I2000\nt" + U8 + b"I00\ng1\ntba")
        + b"."
    ),
    "the same bytes many times": lambda s: (
        b"(lp0\nV" + 5000 * b"a" + b"\np1\na" + 99 * b"c_codecs\nencode\n(g1\nVlatin1\ntRa" + b"."
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(tmp_path: Path, name: str) -> None:
    sentinel = tmp_path / "executed"
    path = write(tmp_path, HOSTILE[name](str(sentinel)))
    with pytest.raises(DataError, match=r"need NumPy arrays and builtin containers, got .*some\.pkl"):
        load_pickle(path)
    assert not sentinel.exists()


def test_the_hostile_files_are_live(tmp_path: Path) -> None:
    sentinel = tmp_path / "executed"
    pickle.loads(HOSTILE["os.system"](str(sentinel)))  # noqa: S301  # our own file, to see that it would act
    assert sentinel.exists()


def test_refusal_names_what_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"a reference to {os.system.__module__}\.system in "):
        load_pickle(write(tmp_path, HOSTILE["os.system"]("x")))
    with pytest.raises(DataError, match="the pickle instruction BINPERSID"):
        load_pickle(write(tmp_path, HOSTILE["binary persistent id"]("x")))
    with pytest.raises(DataError, match="dtype 'O8'"):
        load_pickle(write(tmp_path, HOSTILE["plain object array"]("x")))


WHOLE = pickle.dumps({"image_data": np.arange(4000, dtype=np.uint8)}, protocol=4)
DAMAGED = {
    "empty": b"",
    "truncated": WHOLE[:-10],
    "truncated early": WHOLE[:30],
    "without end": WHOLE[:-1],
    "text": b"hello, this is no pickle\n",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "zeros": bytes(100),
    "stack underflow": b"0.",
    "unknown memo entry": b"g7\n.",
    "array larger than the file": ARRAY + b"(I1\n(I1000000000000\nt" + U8 + b"I00\nC\x03abctb.",
    "array of nothing": ARRAY + b"(I1\n(I1000000000000\nt" + U8.replace(b"u1", b"S0") + b"I00\nC\x00tb.",
    "negative shape": ARRAY + b"(I1\n(I-1\nI-3\nt" + U8 + b"I00\nC\x03abctb.",
    "bytes longer than the file": b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b"abc.",
    "bytearray longer than the file": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"abc.",
    "text longer than the file": b"\x80\x04\x8d" + (2**50).to_bytes(8, "little") + b"abc.",
    "string longer than the file": b"\x80\x02T" + (2**31).to_bytes(4, "little") + b"abc.",
    "frame longer than the file": b"\x80\x04\x95" + (2**50).to_bytes(8, "little") + b"N.",
    "protocol 9": b"\x80\x09N.",
    "tuples in tuples as a shape": (ARRAY + b"(I1\n(" + nested(60) + b"t" + U8 + b"I00\nC\x03abctb."),
    "enormous numbers as a shape": ARRAY
    + b"(I1\n("
    + 40 * (b"\x8b\0\x20\0\0" + 8192 * b"\x7f")
    + b"t"
    + U8
    + b"I00\nC\0tb.",
    "text of no characters": pickle.dumps(np.full(3, 0x110000, np.uint32)).replace(b"u4", b"U1"),
    "long text of no characters": pickle.dumps(np.full(3000, 0x110000, np.uint32)).replace(b"u4", b"U1"),
    "more dimensions than arrays have": ARRAY + b"(I1\n(" + 40 * b"I1\n" + b"t" + U8 + b"I00\nC\x01atb.",
    "pickle and zip in one": WHOLE + b"PK\x05\x06" + bytes(18),
    "two pickles": WHOLE + WHOLE,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"need .*some\.pkl.*; .*get it again"):
        load_pickle(write(tmp_path, DAMAGED[name]))


def test_number_of_instructions_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_READS", 100)
    assert load_pickle(write(tmp_path, 99 * b"]" + b".")) == []
    with pytest.raises(DataError, match="more instructions than any published file has"):
        load_pickle(write(tmp_path, 100 * b"]" + b"."))


@pytest.mark.parametrize("value", [[2**64], [0.5], ["a"], [[1, 2]], np.ones((2, 2), int), np.ones(2), 3, None, "ab"])
def test_integers_are_flat(value: Any) -> None:
    assert integers(value) is None


def test_lists_in_lists_are_not_unfolded(tmp_path: Path) -> None:
    rows = b"(lp0\n" + b"".join(b"0(lp%d\ng%d\nag%d\na" % (i + 1, i, i) for i in range(60))  # 2^60 empty lists
    pixels = ARRAY + b"(I1\n(I1\nI1\nI1\nI3\nt" + U8 + b"I00\nC\x03abctb"
    path = tmp_path / "mini-imagenet-cache-train.pkl"
    path.write_bytes(b"}Vimage_data\n" + pixels + b"sVclass_dict\n}Va\n" + rows + b"ss.")
    with pytest.raises(DataError, match='need "class_dict"'):
        mini_imagenet.load("train", root=tmp_path)


def test_rows_of_many_classes_are_not_copied(tmp_path: Path) -> None:
    rows = list(range(1000))
    data = {"image_data": np.zeros((1000, 1, 1, 3), np.uint8), "class_dict": {f"c{c}": rows for c in range(20_000)}}
    (tmp_path / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps(data))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="each of the 1000 images once"):
            mini_imagenet.load("train", root=tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 5e7
    finally:
        tracemalloc.stop()


def test_a_huge_array_of_a_sparse_file_takes_no_memory(tmp_path: Path) -> None:
    with open(tmp_path / "train_images_png.pkl", "wb") as file:
        file.write(
            b"\x80\x04(lp0\n" + ARRAY + b"(I1\n(I%d\nt" % 2**29 + U8 + b"I00\n\x8e" + (2**29).to_bytes(8, "little")
        )
        file.seek(2**29, 1)
        file.write(b"tba.")
    (tmp_path / "train_labels.pkl").write_bytes(pickle.dumps({"label_specific": [0]}))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"at most 268435456 bytes, got 536870912, image 0"):
            tiered_imagenet.load("train", root=tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1e8
    finally:
        tracemalloc.stop()


def test_huge_memo_index_takes_no_memory(tmp_path: Path) -> None:
    assert load_pickle(write(tmp_path, b"\x80\x02Nr\xff\xff\xff\xff.")) is None


def test_huge_first_shape_takes_no_memory(tmp_path: Path) -> None:
    assert load_pickle(write(tmp_path, ARRAY.replace(b"(I0\n", b"(I1000000000000\n") + b".")).size == 0


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><html>", b"\n  <html>", b"\xef\xbb\xbf<?xml version='1.0'?>"])
def test_html_page(tmp_path: Path, page: bytes) -> None:
    with pytest.raises(DataError, match=r"some\.pkl: this is an HTML page, a failed download"):
        load_pickle(write(tmp_path, page))


def test_missing_and_too_large(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a file"):
        load_pickle(tmp_path / "none.pkl")
    with pytest.raises(DataError, match="at most 10 bytes"):
        load_pickle(write(tmp_path, WHOLE), max_bytes=10)
