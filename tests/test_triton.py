"""The CUDA kernels, on a machine without one: interpreted against ATen's passes, and compiled for two architectures."""

import importlib
import inspect
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from l2g_meta.inner import twice_differentiable
from l2g_meta.models.blocks import BatchNormReLU2d
from l2g_meta.operators import kernels
from l2g_meta.operators.kernels import aten

pytest.importorskip("triton", reason="Triton is not installed")
fused = importlib.import_module("l2g_meta.operators.kernels.triton")


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # is read when the kernels are defined
interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_the_interpreter():
    """All tests below that need TRITON_INTERPRET=1, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "23 passed" in done.stdout, done.stdout + done.stderr


def maps(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


# Odd sizes, more channels than a program holds, more rows than one takes, a single row of windows.
SHAPES = [(2, 5, 5, 4), (1, 70, 2, 3), (3, 3, 12, 12)]


@interpreter
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_kernels_equal_atens(shape, relu, pool):
    torch.manual_seed(0)
    x, (w, b, vw, vb) = maps(*shape), torch.randn(4, shape[1])
    close = {"rtol": 1e-4, "atol": 1e-5}
    running = [torch.randn(2, shape[1]).abs() for _ in range(2)]
    running[1].copy_(running[0])
    found, expected = (m.statistics(x, *r, 0.3) for m, r in zip((fused, aten), running, strict=True))
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(*running, **close)

    mean, rstd = expected[0], (expected[1] + 1e-5).rsqrt()
    y, where = fused.forward(x, w, b, mean, rstd, relu, pool)
    y_aten, where_aten = aten.forward(x, w, b, mean, rstd, relu, pool)
    torch.testing.assert_close(y, y_aten, **close)
    if pool:
        assert torch.equal(fused.index(where, x), aten.index(where_aten, x))

    g, v = maps(*y.shape), maps(*shape)
    ours, theirs = [g, x, w, mean, rstd, y_aten if relu else None], [where, where_aten]
    for name, cotangents in (("backward", ()), ("double_backward", (v, vw, vb))):
        found = getattr(fused, name)(*cotangents, *ours, theirs[0])
        expected = getattr(aten, name)(*cotangents, *ours, theirs[1])
        for f, e in zip(found, expected, strict=True):
            assert f.stride() == e.stride()
            torch.testing.assert_close(f, e, **close)


@interpreter
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_hidden(value, pool):
    """A diverged run shows: NaN stays NaN through ReLU, pooling and their backward passes."""
    torch.manual_seed(0)
    x, (w, b) = maps(2, 3, 4, 4), torch.randn(2, 3)
    mean, rstd = torch.zeros(3), torch.ones(3)
    x[0, 0, 1, 1] = x[1, 2, 0, 3] = value
    (y, where), (y_aten, where_aten) = (m.forward(x, w, b, mean, rstd, True, pool) for m in (fused, aten))
    torch.testing.assert_close(y, y_aten, equal_nan=True, rtol=1e-5, atol=1e-5)
    if value == value:
        return  # the backward pass gives NaN for more than ATen's
    g = maps(*y.shape)
    found, expected = (
        m.backward(g, x, w, mean, rstd, out, at) for m, out, at in ((fused, y, where), (aten, y_aten, where_aten))
    )
    assert [f.isfinite().tolist() for f in found] == [e.isfinite().tolist() for e in expected]


@interpreter
@pytest.mark.parametrize("relu, pool", [(False, False), (True, False), (True, True)])
def test_a_layer_through_autograd_to_third_order(relu, pool, monkeypatch):
    found = []
    for of in (lambda x: fused if fused.takes(x) else aten, lambda x: aten):
        monkeypatch.setattr(kernels, "of", of)
        torch.manual_seed(0)
        norm = BatchNormReLU2d(3, pool=pool) if relu else nn.BatchNorm2d(3)
        x, leaves = maps(2, 3, 6, 5).requires_grad_(), list(norm.parameters())
        for p in leaves:
            nn.init.uniform_(p, 0.5, 2)
        with twice_differentiable():
            y = norm(x)
        first = torch.autograd.grad(y.pow(3).sum(), [x, *leaves], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *leaves], create_graph=True)
        third = torch.autograd.grad(sum(g.square().sum() for g in second), [x, *leaves])
        found.append([y, *first, *second, *third, norm.running_mean, norm.running_var])
    for f, e in zip(*found, strict=True):
        assert (f - e).norm() <= 1e-3 * e.norm()


@pytest.mark.skipif(INTERPRETED, reason="there is nothing to compile")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("relu, pool", [(False, False), (True, False), (True, True)])
def test_kernels_compile_for_a_gpu(relu, pool, double, capability, tmp_path, monkeypatch):
    """To machine code, which needs the compiler that Triton brings, but no GPU."""
    compiler = pytest.importorskip("triton.compiler", reason="no Triton compiler")
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    options = {"RELU": relu, "POOL": pool, "DOUBLE": double, "BLOCK": fused.BLOCK, "CHANNELS": 64, "LOOPS": fused.LOOPS}
    for name in ("statistics_kernel", "forward_kernel", "sums_kernel", "apply_kernel"):
        kernel = getattr(fused, name)
        constants = {k: value for k, value in options.items() if k in kernel.arg_names}
        absent = [] if pool else ["where"]
        absent += ["y"] if not relu and name != "forward_kernel" else []
        absent += [] if double else ["v", "bar_g"]
        constants |= {argument: None for argument in absent if argument in kernel.arg_names}
        integers = {"where": "*i8"} | dict.fromkeys(("windows", "height", "width", "C", "rows", "programs"), "i32")
        signature = {n: "constexpr" if n in constants else integers.get(n, "*fp32") for n in kernel.arg_names}
        source = compiler.ASTSource(kernel, signature, constants)
        assert compiler.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


def test_maps_that_the_kernels_take():
    assert fused.takes(maps(2, 3, 4, 4))
    assert not fused.takes(torch.randn(2, 3, 4, 4)) and not fused.takes(maps(2, 3, 4, 4).double())
    assert kernels.of(maps(2, 3, 4, 4)) is aten  # on the CPU


def test_both_files_have_the_same_passes():
    for name in ("statistics", "forward", "backward", "double_backward", "index"):
        assert list(inspect.signature(getattr(aten, name)).parameters) == list(
            inspect.signature(getattr(fused, name)).parameters
        )
