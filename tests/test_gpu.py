# SPDX-License-Identifier: Apache-2.0
"""On a GPU, every op by every backend, dtype and tile beside float64: the kernels as they are used.

What is run comes from the tables: a tile that is added is tested. Each result is written over NaN.
Without a GPU nothing here runs; the same kernels are interpreted and run on the PTX machine in
tests/kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import resnet_fast
from resnet_fast import _hardware, ops
from resnet_fast.dispatch import table, tiles, tuning
from resnet_fast.dispatch.heuristics import Candidate, Family
from resnet_fast.spec import ConvSpec, StemSpec

pytest.importorskip("triton", reason="the tables of kernels are compiled by Triton's tools")

from tests.support import cases, families, join_cases
from tests.support import stem as stem_cases
from tests.support.tolerance import assert_within

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]
CONV, JOIN, STEM = ops.CONV_BN_ACT, ops.CONV_BN_JOIN, ops.STEM_POOL
DEVICE = "cuda"
OLDEST = 80  # whose tables are collected where there is no GPU
HERE = _hardware.capability_of(torch.device(DEVICE)) if torch.cuda.is_available() else OLDEST
ARCH = _hardware.nearest_architecture(HERE) or OLDEST


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No plan and no measured choice of anyone's; no gradients."""
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("RESNET_FAST_BACKEND", raising=False)
    tuning._loaded.cache_clear()
    for op in ops.OPS.values():
        monkeypatch.setattr(op, "_plans", {})
    with torch.inference_mode():
        yield
    tuning._loaded.cache_clear()


@pytest.fixture
def precision():
    """precision(name): float32 convolutions are "tf32" or "ieee"."""
    flags = torch.backends.cudnn.conv
    before = flags.fp32_precision
    yield lambda name: setattr(flags, "fp32_precision", name)
    flags.fp32_precision = before


def skip_if_missing(backend: str) -> None:
    """Skip a test of a backend that this machine cannot run, with the reason."""
    for row in table.of(CONV.name):
        if row.backend == backend and (reason := row.missing(HERE)):
            pytest.skip(reason)


@pytest.fixture
def with_tile(monkeypatch):
    """with_tile(op, backend, tile): that backend cuts every problem of the op by that tile."""

    def with_tile(op: str, backend: str, tile) -> None:
        skip_if_missing(backend)
        only = Family(
            backend, lambda arch, dtype: (tile,),
            lambda spec, tile, gpu: Candidate(tile, None, 1.0),
        )  # fmt: skip
        ours = table.row_of(op, backend)
        rows = (replace(row, family=only) if row is ours else row for row in table.ROWS)
        monkeypatch.setattr(table, "ROWS", tuple(rows))

    return with_tile


def works(op: str) -> list:
    """(backend, work) of all families of an op."""
    return [
        pytest.param(backend, work, id=f"{backend}-{work.dtype}-{work.tile}-{work.problem}")
        for backend in ("triton", "cuda")
        for work in families.FAMILIES[f"{backend} {op}"](ARCH)
    ]


def here(tensor):
    """The tensor on the GPU, its strides kept; what is no tensor as it is."""
    return tensor.to(DEVICE) if isinstance(tensor, torch.Tensor) else tensor


def run(op: Callable, *arguments, like: torch.Tensor) -> torch.Tensor:
    """The op's result, whose memory was NaN before."""
    torch.full_like(like, float("nan"), device=DEVICE)
    return op(*map(here, arguments)).cpu()


def check_conv(spec: ConvSpec, backend: str, **options) -> None:
    t = cases.conv_tensors(spec, **options)
    geometry = (spec.stride, spec.padding, spec.dilation, spec.groups, spec.activation)
    arguments = (t.x, t.weight, t.scale, t.shift, t.residual, *geometry, t.mean, t.var, t.eps)
    y = run(CONV.overload, *arguments, backend, like=t.out)
    assert CONV.last_plan().backend == backend
    assert_within(y, t.eager(), t.reference(), spec.k_gemm, f"{spec} by {backend}")
    if t.residual is not None:
        residual = here(t.residual)
        CONV.inplace(*map(here, arguments[:4]), residual, *map(here, arguments[5:]), backend)
        assert torch.equal(residual.cpu(), y)  # written over the residual: the same sums


@pytest.mark.parametrize(("backend", "work"), works(CONV.name))
def test_each_tile_of_the_convolution(backend, work, with_tile, precision):
    with_tile(CONV.name, backend, work.tile)
    precision(work.problem.precision)
    check_conv(work.problem, backend)
    assert CONV.last_plan().tile == work.tile


LAYERS = {**cases.resnet_convs(18, n=3, size=64), **cases.resnet_convs(50, n=3, size=64)}


@pytest.mark.parametrize("kind", cases.KINDS, ids="-".join)
@pytest.mark.parametrize("name", [*LAYERS, *cases.ODD])
@pytest.mark.parametrize("backend", ["triton", "cuda", "aten"])
def test_convolutions_by_the_tile_that_is_chosen(backend, name, kind, precision):
    spec = {**LAYERS, **cases.ODD}[name]
    spec = replace(spec, dtype=kind[0], precision=kind[1])
    precision(spec.precision)
    try:
        check_conv(spec, backend)
    except ValueError as error:
        pytest.skip(str(error))  # which the tests of dispatch look at


@pytest.mark.parametrize(("backend", "work"), works(JOIN.name))
def test_each_tile_of_the_join(backend, work, with_tile, precision):
    spec = work.problem
    with_tile(JOIN.name, backend, work.tile)
    precision(spec.main.precision)
    t = join_cases.join_tensors(spec)
    m, p = t.main, t.projection
    call = ops.JoinCall(
        m.x, m.weight, m.scale, m.shift, p.x, p.weight, p.scale, p.shift, spec.projection.stride,
        mean=m.mean, var=m.var, proj_mean=p.mean, proj_var=p.var, backend=backend,
    )  # fmt: skip
    y = run(JOIN.overload, *call, like=t.out)
    assert_within(y, t.eager(), t.reference(), t.k_gemm, f"{spec} by {backend}")


@pytest.mark.parametrize("image", [False, True], ids=["numbers", "bytes"])
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("backend", "tile"), [("triton", None), *(("cuda", t) for t in tiles.CUDA_TILES[StemSpec])],
    ids=str,
)  # fmt: skip
def test_each_tile_of_the_stem(backend, tile, dtype, layout, image, with_tile, precision):
    precision("tf32")
    if tile is not None:
        with_tile(STEM.name, backend, tile)
    t = stem_cases.stem_tensors(2, 45, 38, 64, dtype, layout=layout, image=image)
    call = ops.StemCall(t.x, t.weight, t.scale, t.shift, t.mean, t.var, t.eps, t.image_mean,
                        t.image_std, backend)  # fmt: skip
    try:
        y = run(STEM.overload, *call, like=t.out)
    except ValueError as error:
        pytest.skip(str(error))  # no extension, or x in a layout that Triton refuses
    assert_within(y, t.eager(), t.reference(), stem_cases.K_GEMM, f"stem by {backend}")


@pytest.mark.parametrize("numel", [1, 5000, 2**20])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda", "aten"])
def test_the_addition(backend, dtype, numel, monkeypatch):
    skip_if_missing(backend)
    monkeypatch.setenv("RESNET_FAST_BACKEND", backend)
    x, y = torch.randn(2, numel).to(dtype)
    expected = torch.relu(x + y)
    assert torch.equal(run(ops.add_relu, x, y, like=expected), expected)
    assert ops.ADD_RELU.last_plan().backend == backend


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_model_runs_fused_and_agrees(name, backend, dtype, monkeypatch):
    """No layer falls back: the weights are channels_last, which the kernels ask for."""
    skip_if_missing(backend)
    if backend != "auto":
        monkeypatch.setenv("RESNET_FAST_BACKEND", backend)
    torch.manual_seed(0)
    model = getattr(resnet_fast.models, name)(num_classes=10).eval().to(DEVICE)
    x = torch.randn(2, 3, 96, 96, device=DEVICE)
    model = model.to(getattr(torch, dtype), memory_format=torch.channels_last)
    x = x.to(getattr(torch, dtype), memory_format=torch.channels_last)
    with resnet_fast.disabled():
        eager, reference = model(x).cpu(), copy.deepcopy(model).double()(x.double()).cpu()
    assert_within(model(x).cpu(), eager, reference, 1, name)
    rows = list(resnet_fast.report(model))
    assert rows and all(row.fused and not row.reason for row in rows)
    assert not any("aten" in row.backend for row in rows)
