# SPDX-License-Identifier: Apache-2.0
"""The join's backends: who takes what, why not, which tile, and what a name asks for."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from resnet_fast import _hardware, ops
from resnet_fast.dispatch import heuristics, join
from resnet_fast.dispatch.backends import Problem
from resnet_fast.dispatch.join import JoinProblem
from resnet_fast.kernels import cuda as kernel
from tests.support import join_cases

SPEC = join_cases.join(2, 6, 6, 16, 32, 24, stride=(2, 2))
FP32 = ("float32",) * 4


def problem_of(spec, device="cuda", arch=90) -> JoinProblem:
    parts = (
        Problem(
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
    return {row.name: row for row in join.JOIN_BACKENDS}.__getitem__


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
    refused = join.cuda_refusal(problem)
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
    assert reason in join.cuda_refusal(problem)
    if name not in ("pixels", "taps"):
        assert row("triton").refusal(problem) is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_gpu_kernels_take_the_rest(dtype, row):
    problem = changed(ON_CUDA, "main", dtype=dtype, x="channels_inner")
    assert join.cuda_refusal(problem) is None
    assert row("triton").refusal(problem) is None
    assert row("triton").refusal(replace_arch(problem, 75)) == "compute capability 7.5 is below 8.0"


def replace_arch(problem: JoinProblem, arch: int) -> JoinProblem:
    return JoinProblem(replace(problem.main, arch=arch), replace(problem.projection, arch=arch))


def test_the_cpu_runs_two_convolutions_and_says_why_not():
    on_cpu = changed(ON_CPU, "main", dtype="float32")
    plan = join.plan(on_cpu)
    assert plan.backend == "cpu"
    assert not plan.is_one_kernel
    assert plan.refusals["triton"] == "runs on cuda tensors, not cpu"
    refused = changed(on_cpu, "projection", x="strided")
    assert join.plan(refused).backend == "aten"
    assert "x is strided" in join.plan(refused).why_fallback()
    with pytest.raises(ValueError, match=r"backend 'cpu' cannot take .*: x is strided"):
        join.plan(refused, "cpu")


def test_aten_refuses_nothing():
    problem = changed(ON_CPU, "main", dtype="float64", x="strided", vectors=False)
    assert join.plan(problem, "aten").backend == "aten"


def test_the_environment_prefers_and_the_argument_insists(monkeypatch):
    on_cpu = changed(ON_CPU, "main", dtype="float32")
    monkeypatch.setenv("RESNET_FAST_BACKEND", "aten")
    assert join.plan(on_cpu).backend == "aten"
    assert join.plan(on_cpu, "cpu").backend == "cpu"
    monkeypatch.setenv("RESNET_FAST_BACKEND", "triton")
    assert join.plan(on_cpu).backend == "cpu"  # a preference, which cannot be met
    monkeypatch.setenv("RESNET_FAST_BACKEND", "cudnn")  # which has convolutions alone
    assert join.plan(on_cpu).backend == "cpu"
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"):
        join.plan(on_cpu, "cudnn")
    monkeypatch.setenv("RESNET_FAST_BACKEND", "tpu")
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        join.plan(on_cpu)


@pytest.mark.parametrize("name", ["auto", "cuda", "triton", "cpu", "aten", "cudnn"])
def test_one_kernel_is_only_where_the_name_has_one(name, monkeypatch):
    one_kernel = name in ("auto", "cuda", "triton")
    assert join.may_be_one_kernel("cuda", name) == one_kernel
    assert not join.may_be_one_kernel("cpu", name)
    monkeypatch.setenv("RESNET_FAST_BACKEND", name.replace("auto", ""))
    assert join.may_be_one_kernel("cuda", "auto") == one_kernel
    assert join.may_be_one_kernel("cuda", "cuda")


def test_explain_names_every_backend():
    chosen, others = ops.explain_join("cpu", "float32")
    assert chosen == "cpu"
    assert {chosen, *others} == {row.name for row in join.JOIN_BACKENDS}
    assert all(others.values())


@pytest.mark.parametrize("arch", join.TILES)
def test_every_network_has_a_tile_and_large_batches_a_larger_one(arch):
    gpu = _hardware.GPUS[arch]
    for depth in (18, 50):
        for kind in ({"dtype": "float16"}, {"dtype": "float32"}, {"precision": "ieee"}):
            kind = {"dtype": "float32", **kind}
            for spec in join_cases.resnet_joins(depth, n=8, **kind).values():
                tile = join.choose_tile(spec, arch)
                assert join.tile_refusal(spec, tile, gpu) is None
    large = join_cases.resnet_joins(50, n=256)["layer2"]
    small = join_cases.resnet_joins(50, n=1)["layer4"]
    large, small = (join.choose_tile(spec, arch) for spec in (large, small))
    assert large.BLOCK_M * large.BLOCK_N > small.BLOCK_M * small.BLOCK_N


def test_tiles_have_reasons_and_short_tables():
    for table in (*join.TILES.values(), join.CUDA_TILES):
        assert len(table) <= 12
        assert len(set(table)) == len(table)
        assert all(tile.reason for tile in table)


def test_the_cuda_tile_follows_the_batch():
    large = join_cases.resnet_joins(50, n=256)["layer2"]
    small = join_cases.resnet_joins(50, n=1)["layer4"]
    assert join.choose_cuda_tile(large, 80) < join.choose_cuda_tile(small, 80)
    assert join.choose_cuda_tile(small, 80) == len(join.CUDA_TILES) - 1


def test_both_sums_of_a_thread_count_as_registers():
    """Of 128x64 by 4 warps two blocks fit an SM of 65536 registers, where one sum would let three.

    That the machine code agrees is asserted where it is compiled, in test_cuda_join.py.
    """
    gpu = _hardware.GPUS[90]
    whole = join_cases.resnet_joins(50, n=256)["layer4"].as_one_product
    tile = join.CUDA_TILES[1]
    assert (tile.BLOCK_M, tile.BLOCK_N, tile.NUM_WARPS) == (128, 64, 4)
    assert heuristics.resident_blocks(whole, tile, gpu) == 3
    assert heuristics.resident_blocks(whole, tile, gpu, sums=join.SUMS) == 2


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_plan_tells_its_tile(dtype, built, monkeypatch):
    op = SimpleNamespace(default=None)
    monkeypatch.setattr(torch.ops.resnet_fast, "_conv_bn_join_cuda", op, raising=False)
    problem = changed(ON_CUDA, "main", dtype=dtype)
    tile = join.CUDA_TILES[join.choose_cuda_tile(problem.spec, 90)]
    halves = 2 if dtype == "float32" else 1
    assert join.plan(problem, "cuda").tile == replace(tile, BLOCK_K=tile.BLOCK_K // halves)
    assert join.plan(problem, "triton").tile == join.choose_tile(problem.spec, 90)
    assert join.plan(problem, "aten").tile is None


def test_cuda_gets_the_arguments_of_its_schema(monkeypatch):
    """Against the schema that the launcher registers, where there is one; no GPU is needed."""
    given = []
    namespace = type("Packet", (), {"default": staticmethod(lambda *a: given.append(a))})
    monkeypatch.setattr(torch.ops.resnet_fast, "_conv_bn_join_cuda", namespace, raising=False)
    (row,) = (row for row in join.JOIN_BACKENDS if row.name == "cuda")
    tensors = join_cases.join_tensors(SPEC)
    h, *of_main, x = tensors.arguments()[:8]
    of_projection = tensors.arguments()[8:14]
    y = row.build(ON_CUDA)(*of_main, *of_projection)(h, x)
    (arguments,) = given
    names = (
        *("h", "weight", "scale", "shift", "mean", "var", "eps"),
        *("x", "proj_weight", "proj_scale", "proj_shift", "proj_mean", "proj_var", "proj_eps"),
        *("stride", "tile", "out"),
    )
    named = dict(zip(names, arguments, strict=True))
    assert named["h"] is h and named["x"] is x and named["out"] is y
    assert named["proj_var"] is tensors.projection.var and named["eps"] == 1e-5
    assert named["stride"] == [2, 2] and named["tile"] in range(len(join.CUDA_TILES))
    assert y.shape == (2, 24, 6, 6) and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "arch, n, first",
    [(80, 256, "cuda"), (90, 1, "cuda"), (90, 256, "triton"), (100, 256, "triton")],
)
def test_the_order_is_the_preferences(arch, n, first, monkeypatch):
    """Large joins of the last stage are bound by arithmetic, for which Triton has wgmma."""
    monkeypatch.setattr(join, "_refusal", lambda row, problem: None)
    problem = problem_of(join_cases.resnet_joins(50, n=n)["layer4"], arch=arch)
    chosen, others = join.explain(problem)
    assert chosen == first
    assert all(why == f"{first} comes first" for why in others.values())
