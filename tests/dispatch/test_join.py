# SPDX-License-Identifier: Apache-2.0
"""The join's backends: who takes what, why not, which tile, and what a name asks for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from resnet_fast import _hardware, ops
from resnet_fast.dispatch import cuda, gemm, heuristics, table, tiles
from resnet_fast.dispatch.problem import ConvProblem, JoinProblem
from resnet_fast.kernels import cuda as kernel
from resnet_fast.spec import JoinSpec
from tests.support import join_cases

SPEC = join_cases.join(2, 6, 6, 16, 32, 24, stride=(2, 2))
FP32 = ("float32",) * 4
JOIN = JoinProblem.op
TRITON, TRITON_TILES = tiles.TRITON[JoinSpec], tiles.TRITON_TILES[JoinSpec]
CUDA_TILES = tiles.CUDA_TILES[JoinSpec]


def nothing(*_) -> None:
    return None


def chosen_cuda(spec, arch: int):
    return heuristics.choose(spec, arch, tiles.CUDA[JoinSpec])


def problem_of(spec, device="cuda", arch=90) -> JoinProblem:
    parts = (
        ConvProblem(
            spec=part, device=device, arch=arch, x="channels_last", weight="channels_last",
            residual="", x_strides=(part.h * part.w * part.c, part.w * part.c, part.c),
            vectors=True, vector_dtypes=FP32, tracked=True, aligned=True,
        )
        for part in (spec.main, spec.projection)
    )  # fmt: skip
    return JoinProblem(*parts)


ON_CUDA = problem_of(SPEC)
ON_CPU = problem_of(SPEC, "cpu", 0)


def changed(problem: JoinProblem, part: str, **changes) -> JoinProblem:
    """The problem with one convolution's fields changed; those of its spec, for both."""
    of_spec = {k: changes.pop(k) for k in ("dtype", "precision") if k in changes}
    parts = {
        name: replace(p, spec=replace(p.spec, **of_spec))
        for name, p in (("main", problem.main), ("projection", problem.projection))
    }
    parts[part] = replace(parts[part], **changes)
    return JoinProblem(**parts)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No variable is set, and the extension is taken for one that holds every architecture."""
    monkeypatch.setattr(kernel, "architecture_refusal", lambda arch: None)
    monkeypatch.setattr(kernel, "module", lambda: None)
    monkeypatch.delenv("RESNET_FAST_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def row():
    return partial(table.row_of, JOIN)


BOTH_REFUSE = {
    "h-contiguous": (changed(ON_CUDA, "main", x="contiguous"), "h is contiguous"),
    "x-strided": (changed(ON_CUDA, "projection", x="strided"), "x is strided"),
    "weight": (changed(ON_CUDA, "main", weight="contiguous"), "weight is contiguous"),
    "proj-weight": (
        changed(ON_CUDA, "projection", weight="contiguous"), "proj_weight is contiguous",
    ),
    "vectors": (changed(ON_CUDA, "projection", vectors=False), "proj_weight's BatchNorm is not"),
    "float64": (changed(ON_CUDA, "main", dtype="float64"), "dtype float64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOTH_REFUSE)
def test_the_gpu_kernels_refuse_with_the_reason(name, row):
    problem, reason = BOTH_REFUSE[name]
    assert reason in row("triton").refusal(problem)
    part = "main" if problem.main != ON_CUDA.main else "projection"
    of_part = reason.replace("h is", "x is").replace("proj_weight", "weight")
    of_part = of_part.replace("weight's BatchNorm is not", "is not contiguous")
    refused = cuda.join_refusal(problem)
    assert refused.startswith(f"{part}: ") and of_part in refused


CUDA_REFUSES = {
    "ieee": (changed(ON_CUDA, "main", dtype="float32", precision="ieee"), "TF32"),
    "taps": (problem_of(join_cases.join(1, 6, 6, 16, 16, 16, r=1, s=17)), "filter 1x17"),
    "c": (problem_of(join_cases.join(1, 6, 6, 12, 16, 16)), "main: C 12"),
    "d": (problem_of(join_cases.join(1, 6, 6, 16, 20, 16)), "projection: C 20"),
    "k": (problem_of(join_cases.join(1, 6, 6, 16, 16, 20)), "K 20"),
    "strides": (changed(ON_CUDA, "projection", x_strides=(4608, 388, 32)), "no multiples of 16"),
    "misaligned": (changed(ON_CUDA, "main", aligned=False), "multiple of 16 bytes"),
    "pixels": (problem_of(join_cases.join(2**15, 256, 256, 8, 8, 8)), "output pixels"),
    "weight": (problem_of(join_cases.join(1, 1, 1, 8, 2**15, 2**15)), "2147483648 bytes of weight"),
}


@pytest.mark.parametrize("name", CUDA_REFUSES)
def test_cuda_refuses_more(name, row):
    problem, reason = CUDA_REFUSES[name]
    assert reason in cuda.join_refusal(problem)
    if name not in ("pixels", "taps"):
        assert row("triton").refusal(problem) is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_gpu_kernels_take_the_rest(dtype, row, gpu_is_here):
    problem = changed(ON_CUDA, "main", dtype=dtype, x="channels_inner")
    assert cuda.join_refusal(problem) is None
    assert row("triton").refusal(problem) is None
    old = replace_arch(problem, 75)
    assert row("triton").why_not(old) == "compute capability 7.5 is below 8.0"


def replace_arch(problem: JoinProblem, arch: int) -> JoinProblem:
    return JoinProblem(replace(problem.main, arch=arch), replace(problem.projection, arch=arch))


def test_the_cpu_runs_two_convolutions_and_says_why_not():
    on_cpu = changed(ON_CPU, "main", dtype="float32")
    plan = table.plan(on_cpu)
    assert plan.backend == "cpu"
    assert not plan.is_one_kernel
    assert plan.refusals["triton"] == "runs on cuda tensors, not cpu"
    refused = changed(on_cpu, "projection", x="strided")
    assert table.plan(refused).backend == "aten"
    assert "x is strided" in table.plan(refused).why_fallback()
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot take .*: x is strided"):
        table.plan(refused, "cpu")


def test_aten_refuses_nothing():
    problem = changed(ON_CPU, "main", dtype="float64", x="strided", vectors=False)
    assert table.plan(problem, "aten").backend == "aten"


def test_the_environment_prefers_and_the_argument_insists(monkeypatch):
    on_cpu = changed(ON_CPU, "main", dtype="float32")
    monkeypatch.setenv("RESNET_FAST_BACKEND", "aten")
    assert table.plan(on_cpu).backend == "aten"
    assert table.plan(on_cpu, "cpu").backend == "cpu"
    monkeypatch.setenv("RESNET_FAST_BACKEND", "triton")
    assert table.plan(on_cpu).backend == "cpu"  # a preference, which cannot be met
    monkeypatch.setenv("RESNET_FAST_BACKEND", "cudnn")  # which has convolutions alone
    assert table.plan(on_cpu).backend == "cpu"
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"):
        table.plan(on_cpu, "cudnn")
    monkeypatch.setenv("RESNET_FAST_BACKEND", "tpu")
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        table.plan(on_cpu)


@pytest.mark.parametrize("name", ["auto", "cuda", "triton", "cpu", "aten", "cudnn"])
def test_one_kernel_is_only_where_the_name_has_one(name, monkeypatch):
    one_kernel = name in ("auto", "cuda", "triton")
    assert table.may_fuse(JOIN, "cuda", name) == one_kernel
    assert not table.may_fuse(JOIN, "cpu", name)
    monkeypatch.setenv("RESNET_FAST_BACKEND", name.replace("auto", ""))
    assert table.may_fuse(JOIN, "cuda", "auto") == one_kernel
    assert table.may_fuse(JOIN, "cuda", "cuda")


def test_explain_names_every_backend():
    chosen, others = ops.CONV_BN_JOIN.explain("cpu", "float32")
    assert chosen == "cpu"
    assert {"auto", chosen, *others} == set(ops.CONV_BN_JOIN.backends)
    assert all(others.values())


@pytest.mark.parametrize("arch", TRITON_TILES)
def test_every_network_has_a_tile_and_large_batches_a_larger_one(arch):
    gpu = _hardware.GPUS[arch]
    for depth in (18, 50):
        for kind in ({"dtype": "float16"}, {"dtype": "float32"}, {"precision": "ieee"}):
            kind = {"dtype": "float32", **kind}
            for spec in join_cases.resnet_joins(depth, n=8, **kind).values():
                tile = heuristics.choose(spec, arch, TRITON)
                assert TRITON.refusal(spec, tile, gpu) is None
    large = join_cases.resnet_joins(50, n=256)["layer2"]
    small = join_cases.resnet_joins(50, n=1)["layer4"]
    large, small = (heuristics.choose(spec, arch, TRITON) for spec in (large, small))
    assert large.BLOCK_M * large.BLOCK_N > small.BLOCK_M * small.BLOCK_N


def test_tiles_have_reasons_and_short_tables():
    for rows in (*TRITON_TILES.values(), CUDA_TILES):
        assert len(rows) <= 12
        assert len(set(rows)) == len(rows)
        assert all(tile.reason for tile in rows)


def test_the_cuda_tile_follows_the_batch():
    large = join_cases.resnet_joins(50, n=256)["layer2"]
    small = join_cases.resnet_joins(50, n=1)["layer4"]
    large, small = (CUDA_TILES.index(chosen_cuda(spec, 80)) for spec in (large, small))
    assert large < small == len(CUDA_TILES) - 1


def test_both_sums_of_a_thread_count_as_registers():
    """Of 128x64 by 4 warps two blocks fit an SM of 65536 registers, where one sum would let three.

    That the machine code agrees is asserted where it is compiled, in test_cuda_join.py.
    """
    gpu = _hardware.GPUS[90]
    whole = join_cases.resnet_joins(50, n=256)["layer4"].as_one_product
    tile = CUDA_TILES[1]
    assert (tile.BLOCK_M, tile.BLOCK_N, tile.NUM_WARPS) == (128, 64, 4)
    assert gemm.resident_blocks(whole, tile, gpu) == 3
    assert gemm.resident_blocks(whole, tile, gpu, sums=tiles.SUMS) == 2


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_plan_tells_its_tile(dtype, built, monkeypatch):
    op = SimpleNamespace(default=None)
    monkeypatch.setattr(torch.ops.resnet_fast, f"_{JOIN}_cuda", op, raising=False)
    problem = changed(ON_CUDA, "main", dtype=dtype)
    tile = chosen_cuda(problem.spec, 90)
    assert {"float16": 64, "float32": 32}[dtype] == tile.BLOCK_K
    assert table.plan(problem, "cuda").tile == tile
    assert table.plan(problem, "triton").tile == heuristics.choose(problem.spec, 90, TRITON)
    assert table.plan(problem, "aten").tile is None


def test_cuda_gets_the_arguments_of_its_schema(monkeypatch):
    """Against the schema that the launcher registers, where there is one; no GPU is needed."""
    given = []
    namespace = type("Packet", (), {"default": staticmethod(lambda *a: given.append(a))})
    monkeypatch.setattr(torch.ops.resnet_fast, f"_{JOIN}_cuda", namespace, raising=False)
    row = table.row_of(JOIN, "cuda")
    tensors = join_cases.join_tensors(SPEC)
    h, *of_main, x = tensors.arguments()[:8]
    of_projection = tensors.arguments()[8:14]
    y = row.build(ON_CUDA, row.choose(ON_CUDA))(*of_main, *of_projection)(h, x)
    (arguments,) = given
    names = (
        *("h", "weight", "scale", "shift", "mean", "var", "eps"),
        *("x", "proj_weight", "proj_scale", "proj_shift", "proj_mean", "proj_var", "proj_eps"),
        *("stride", "tile", "out"),
    )
    named = dict(zip(names, arguments, strict=True))
    assert named["h"] is h and named["x"] is x and named["out"] is y
    assert named["proj_var"] is tensors.projection.var and named["eps"] == 1e-5
    assert named["stride"] == [2, 2] and named["tile"] in range(len(CUDA_TILES))
    assert y.shape == (2, 24, 6, 6) and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "arch, n, first",
    [(80, 256, "cuda"), (90, 1, "cuda"), (90, 256, "triton"), (100, 256, "triton")],
)
def test_the_order_is_the_preferences(arch, n, first, monkeypatch):
    """Large joins of the last stage are bound by arithmetic, for which Triton has wgmma."""
    rows = (replace(r, missing=nothing, refusal=nothing, family=None) for r in table.ROWS)
    monkeypatch.setattr(table, "ROWS", tuple(rows))
    problem = problem_of(join_cases.resnet_joins(50, n=n)["layer4"], arch=arch)
    chosen, others = table.explain(problem)
    assert chosen == first
    assert others.pop("cpu") == "runs on cpu tensors, not cuda"
    assert all(why.startswith(f"{first} comes first: ") for why in others.values())
