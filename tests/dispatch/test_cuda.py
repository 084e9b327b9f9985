# SPDX-License-Identifier: Apache-2.0
"""The backend `cuda`: what it refuses and why, and what it hands to the C++ op."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from resnet_fast import _hardware, ops
from resnet_fast.dispatch import cuda, heuristics, preferences, table, tiles
from resnet_fast.dispatch.problem import ConvProblem, StemProblem, SumProblem
from resnet_fast.kernels import aten
from resnet_fast.spec import ConvSpec, SumSpec, TileConfig
from tests.support import cases
from tests.support.tolerance import assert_within

CSRC = Path(__file__).parents[2] / "csrc"
CONV = "conv_bn_act"
CUDA, TRITON = tiles.CUDA[ConvSpec], tiles.TRITON[ConvSpec]
CUDA_TILES = tiles.CUDA_TILES[ConvSpec]
SPEC = ConvSpec(2, 9, 7, 64, 40, 3, 3, (2, 2), (1, 1), norm=True, residual=True)


def problem(spec: ConvSpec = SPEC, **changes) -> ConvProblem:
    residual = "channels_last" if spec.residual else ""
    facts = ConvProblem(
        spec=spec, device="cuda", arch=80, x="channels_last", weight="channels_last",
        residual=residual, x_strides=(spec.h * spec.w * spec.c, spec.w * spec.c, spec.c),
        vectors=True, vector_dtypes=("float32",) * 4, tracked=True, aligned=True,
    )  # fmt: skip
    return replace(facts, **changes)


def of(**changes) -> ConvProblem:
    return problem(replace(SPEC, **changes))


REFUSED = {
    "x-contiguous": (problem(x="contiguous"), "x is contiguous, not channels_last"),
    "weight": (problem(weight="contiguous"), "weight is contiguous, not channels_last"),
    "residual": (problem(residual="strided"), "residual is strided, not channels_last"),
    "vectors": (problem(vectors=False), "scale, shift, mean or var is not contiguous"),
    "unaligned": (problem(aligned=False), "does not start at a multiple of 16 bytes"),
    "strides": (problem(x="channels_inner", x_strides=(4489, 487, 67)), "(4489, 487, 67)"),
    "float64": (of(dtype="float64"), "dtype float64"),
    "ieee": (of(dtype="float32", precision="ieee"), "IEEE"),
    "groups": (of(groups=2), "groups 2"),
    "c-12": (of(c=12), "C 12"),
    "k-12": (of(k=12), "K 12"),
    "filter": (of(h=20, r=16, padding=(8, 1)), "filter 16x3"),
    "padding": (of(padding=(1, 2**15)), "above 32767"),
    "pixels": (of(n=2**26, h=16, w=16), "output pixels"),
    "weights": (of(c=2**14, k=2**13 * 2), "bytes of weight"),
    "span": (of(h=2**13, w=2**13), "under one tile"),
    "taps": (
        problem(
            replace(SPEC, w=3, padding=(1, 2**15 - 2), dilation=(1, 2**15 - 1)),
            x="channels_inner", x_strides=(1_080_000, 120_000, 40_000),
        ),
        "elements of x between the filter's taps",
    ),
    "tiny": (of(c=8, r=1, s=1, padding=(0, 0)), "half were padding"),
}  # fmt: skip


def refusal(asked: ConvProblem) -> str | None:
    return table.row_of(CONV, "cuda").why_not(asked)


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_with_the_reason(name, built):
    refused, reason = REFUSED[name]
    assert reason in refusal(refused)


def test_the_largest_filter_is_taken(built):
    assert refusal(of(h=20, w=20, r=15, s=15, padding=(7, 7))) is None


def test_a_slice_with_whole_strides_is_taken(built):
    assert refusal(problem(x="channels_inner", x_strides=(72 * 63, 72 * 7, 72))) is None


def test_a_stride_along_an_axis_of_one_says_nothing(built):
    assert refusal(problem(replace(SPEC, n=1), x_strides=(1, 7 * 64, 64))) is None
    assert "multiples of 16" in refusal(problem(x_strides=(1, 7 * 64, 64)))


def test_float32_strides_count_as_bytes(built):
    """Four float32 are 16 bytes; four halves are not."""
    strides = {"x": "channels_inner", "x_strides": (68 * 63, 68 * 7, 68)}
    assert refusal(problem(replace(SPEC, dtype="float32"), **strides)) is None
    assert "multiples of 16 bytes" in refusal(problem(**strides))


def test_a_missing_extension_is_one_reason_and_the_next_backend_runs(extension, gpu_is_here):
    chosen, others = table.explain(problem())
    assert chosen == "triton"
    assert others["cuda"] == extension.missing()
    with pytest.raises(ValueError, match=r"backend 'cuda' cannot take .*: the extension is not"):
        table.plan(problem(), "cuda")


def test_an_architecture_that_the_binary_lacks_is_named(built, monkeypatch):
    text = "the binary has no code for sm_80"
    monkeypatch.setattr(
        built, "architecture_refusal", lambda arch: f"the binary has no code for sm_{arch}"
    )
    assert refusal(problem()) == text


class Op:
    """In place of the C++ op: remembers what it was given, and computes it with torch."""

    def __init__(self) -> None:
        self.default = self
        self.calls: list[dict] = []

    def __call__(
        self, x, weight, scale, shift, mean, var, eps, residual, stride, padding, dilation, relu,
        tile, split_k, workspace, out,
    ) -> None:  # fmt: skip
        y = F.conv2d(x.float(), weight.float(), None, stride, padding, dilation)
        y = F.batch_norm(y, mean, var, scale, shift, eps=eps)
        y = y if residual is None else y + residual.float()
        out.copy_(F.relu(y) if relu else y)
        self.calls.append(
            {"tile": tile, "split_k": split_k, "workspace": workspace, "out": out, "relu": relu,
             "residual": residual}
        )  # fmt: skip


@pytest.fixture
def op(built, monkeypatch):
    stand_in = Op()
    monkeypatch.setattr(torch.ops.resnet_fast, "_conv_bn_act_cuda", stand_in, raising=False)
    return stand_in


def run(spec: ConvSpec, inplace: bool = False, tile: TileConfig | None = None, arch: int = 80):
    t = cases.conv_tensors(spec)
    asked = problem(spec, arch=arch)
    launch = cuda.conv_build(asked, tile or table.row_of(CONV, "cuda").choose(asked))(
        t.weight, t.scale, t.shift, t.mean, t.var, t.eps
    )
    return t, launch(t.x, t.residual, inplace)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_what_it_hands_over_computes_the_op(dtype, activation, op):
    spec = replace(SPEC, dtype=dtype, activation=activation, precision="tf32")
    t, y = run(spec)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.data_ptr() != t.residual.data_ptr()
    assert_within(y, t.eager(), t.reference(), spec.k_gemm)


def test_in_place_it_writes_over_the_residual(op):
    t, y = run(SPEC, inplace=True)
    assert y is t.residual and op.calls[0]["out"] is t.residual


def test_the_tile_is_the_row_of_the_table(op):
    for row, tile in enumerate(CUDA_TILES):
        run(SPEC, tile=replace(tile, SPLIT_K=1))
        assert op.calls[-1]["tile"] == row
    in_float32 = replace(CUDA_TILES[4], BLOCK_K=32)
    run(replace(SPEC, dtype="float32"), tile=in_float32)
    assert op.calls[-1]["tile"] == 4


def test_by_default_the_tile_is_the_heuristics(op):
    run(SPEC)
    tile = heuristics.choose(SPEC, 80, CUDA)
    assert (op.calls[0]["tile"], op.calls[0]["split_k"]) == (
        tiles.cuda_index(SPEC, tile), tile.SPLIT_K,
    )  # fmt: skip


@pytest.mark.parametrize("split", [2, 3])
def test_a_split_sum_has_its_workspace(split, op):
    run(SPEC, tile=replace(CUDA_TILES[4], SPLIT_K=split))
    workspace = op.calls[0]["workspace"]
    assert op.calls[0]["split_k"] == split
    assert workspace.shape == (split, SPEC.m, SPEC.k) and workspace.dtype == torch.float32
    run(SPEC, tile=CUDA_TILES[4])
    assert op.calls[1]["workspace"] is None


ACCEPTED = {
    "largest-filter": replace(SPEC, h=20, w=20, r=15, s=15, padding=(7, 7)),
    "tf32": replace(SPEC, dtype="float32"),
    "largest-padding": replace(SPEC, padding=(5, cuda.MAX_EXTENT)),
    **{name: spec for name, spec in cases.ODD.items() if cuda.spec_refusal(spec) is None},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_cpp_side_accepts_what_is_handed_over(name, built, monkeypatch):
    """Its checks run on CPU tensors too, in `_conv_problem`, which launches nothing."""
    pytest.importorskip("resnet_fast._C", reason="the extension is not built")
    from tests.support.nvcc import ConvProblem

    spec = ACCEPTED[name]
    if (reason := refusal(problem(spec))) is not None:
        pytest.skip(reason)
    buffer = torch.zeros(ctypes.sizeof(ConvProblem), dtype=torch.uint8)
    checks = torch.ops.resnet_fast._conv_problem.default
    op = SimpleNamespace(default=lambda *arguments: checks(*arguments, buffer))
    monkeypatch.setattr(torch.ops.resnet_fast, "_conv_bn_act_cuda", op, raising=False)
    run(spec)
    found = ConvProblem.from_buffer_copy(buffer.numpy().tobytes())
    assert (found.m, found.k, found.h) == (spec.m, spec.k, spec.h)


def test_add_relu_takes_it_first(built, monkeypatch):
    def add_relu(x, y, out):
        out.copy_(aten.add_relu(x, y))

    monkeypatch.setattr(
        torch.ops.resnet_fast, "_add_relu_cuda", SimpleNamespace(default=add_relu), raising=False
    )
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    explain = ops.ADD_RELU.explain
    assert explain("cuda", "float16")[0] == "cuda"
    assert "float64" in explain("cuda", "float64")[1]["cuda"]
    monkeypatch.setattr(built, "architecture_refusal", lambda arch: f"no code for {arch}")
    chosen, others = explain("cuda", "float16")
    assert chosen == "triton" and others["cuda"] == "no code for 90"
    x = torch.randn(3, 5)
    asked = SumProblem(spec=SumSpec(15, "float32"), device="cuda", arch=90)
    assert torch.equal(cuda.sum_build(asked)()(x, -2 * x), aten.add_relu(x, -2 * x))


def test_of_two_gpus_each_is_asked_for_its_architecture(built, monkeypatch):
    arch = {None: (7, 5), 0: (7, 5), 1: (9, 0)}
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: arch[device.index])
    monkeypatch.setattr(built, "architecture_refusal", lambda arch: "old" if arch < 80 else None)
    chosen = {
        name: ops.ADD_RELU.explain(name, "float16")[0]
        for name in ("cuda", "cuda:0", "cuda:1", "cpu")
    }
    assert chosen == {"cuda": "aten", "cuda:0": "aten", "cuda:1": "cuda", "cpu": "cpu"}


# ---- the tables


def test_the_cpp_table_has_the_same_rows():
    """`Tile<M, N, K, stages, warps m, warps n>`, in order, in the op's .cu file."""
    source = CSRC / "cuda" / "conv_bn_act.cu"
    numbers = re.findall(r"\bTile<((?:\s*\d+\s*,){5}\s*\d+\s*)>", source.read_text())
    rows = [tuple(map(int, row.split(","))) for row in numbers]
    assert len(rows) <= 12
    assert [(m, n, k, s, wm * wn) for m, n, k, s, wm, wn in rows] == [
        (t.BLOCK_M, t.BLOCK_N, t.BLOCK_K, t.NUM_STAGES, t.NUM_WARPS) for t in CUDA_TILES
    ]


def test_every_row_has_a_reason_and_is_chosen_somewhere():
    assert all(tile.reason for tile in CUDA_TILES)
    chosen = set()
    for arch, n, depth in (
        (80, 1, 50),
        (80, 2, 50),
        (80, 8, 18),
        (80, 64, 50),
        (86, 8, 50),
        (89, 32, 50),
    ):
        for dtype in ("float16", "float32"):
            for spec in cases.resnet_convs(depth, n, dtype=dtype).values():
                if cuda.spec_refusal(spec) is None:
                    tile = heuristics.choose(spec, arch, CUDA)
                    chosen.add(tiles.cuda_index(spec, tile))
    assert chosen == set(range(len(CUDA_TILES)))


@pytest.mark.parametrize("arch", _hardware.GPUS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_resnet_convolution_but_the_stem_has_a_tile(arch, dtype):
    for depth, n in ((18, 1), (50, 1), (50, 128)):
        for name, spec in cases.resnet_convs(depth, n, dtype=dtype).items():
            if name.startswith("stem"):
                assert cuda.spec_refusal(spec)
                continue
            assert heuristics.choose(spec, arch, CUDA)


def test_the_cuda_kernel_pads_once_and_triton_at_each_tap():
    spec = replace(SPEC, c=72)
    tile = CUDA_TILES[4]
    walks = tiles.CUDA_GEMM.walk(spec), tiles.TRITON_GEMM.walk(spec)
    assert [walk.steps(tile.BLOCK_K) for walk in walks] == [-(-9 * 72 // 64), 9 * 2]


@pytest.mark.parametrize("arch", _hardware.GPUS)
def test_each_kind_of_convolution_has_one_preference(arch):
    for bound in ("arithmetic", "memory"):
        rows = [
            row for row in preferences.PREFERENCES
            if arch in row.archs and row.limited_by in ("any", bound)
        ]  # fmt: skip
        assert len(rows) == 1 and rows[0].reason
        known = {row.backend for row in table.ROWS if not row.by_name}
        assert set(rows[0].order) <= known and rows[0].order[-1] == "aten"


LARGE = ConvSpec(128, 28, 28, 256, 256, 3, 3, (1, 1), (1, 1))
THIN = ConvSpec(128, 56, 56, 64, 64, 1, 1)


@pytest.mark.parametrize(
    ("spec", "arch", "first"),
    [(LARGE, 80, "cuda"), (LARGE, 89, "cuda"), (LARGE, 90, "triton"), (LARGE, 100, "triton"),
     (LARGE, 120, "cuda"), (THIN, 80, "cuda"), (THIN, 90, "cuda"), (THIN, 103, "cuda")],
)  # fmt: skip
def test_the_preferred_backend_is_asked_first(spec, arch, first, built, monkeypatch):
    row = table.row_of(CONV, "triton")
    takes_all = replace(row, missing=lambda arch: None, refusal=lambda problem: None)
    rows = (takes_all if r is row else r for r in table.ROWS)
    monkeypatch.setattr(table, "ROWS", tuple(rows))
    chosen, others = table.explain(problem(spec, arch=arch))
    assert chosen == first
    other = "triton" if first == "cuda" else "cuda"
    assert others[other].startswith(f"{first} comes first: ")
    assert preferences.preference(spec, arch).reason in others[other]
    assert others["aten"].startswith(f"{first} comes first")


def test_a_plan_says_why_its_backend_was_taken(op):
    reason = preferences.preference(SPEC, 80).reason
    assert table.plan(problem()).why == reason
    grouped = table.plan(of(groups=2))
    assert (grouped.backend, grouped.why) == ("aten", "")
    assert grouped.why_fallback() == "; ".join(grouped.refusals.values())
    assert "groups 2: the CUDA kernel takes 1" in grouped.why_fallback()


@pytest.mark.parametrize("spec", [SPEC, replace(SPEC, dtype="float32")], ids=str)
def test_a_plan_tells_the_tile_that_its_kernel_is_given(spec, op):
    t = cases.conv_tensors(spec)
    plan = table.plan(problem(spec), "cuda")
    plan.bind(t.weight, t.scale, t.shift, t.mean, t.var, t.eps)(t.x, t.residual)
    given = tiles.cuda_tiles(ConvSpec, spec.dtype)[op.calls[-1]["tile"]]
    assert plan.tile == replace(given, SPLIT_K=op.calls[-1]["split_k"])
    assert str(plan.tile).startswith(f"{given.BLOCK_M}x{given.BLOCK_N}x{given.BLOCK_K} stages")


def test_a_plan_of_triton_tells_its_tile_and_that_of_torch_has_none(built):
    assert table.plan(problem(), "triton").tile == heuristics.choose(SPEC, 80, TRITON)
    assert table.plan(problem(), "aten").tile is None


@pytest.mark.parametrize("batch, tile", [(64, "8x7 pooled pixels"), (1, "3x4 pooled pixels")])
def test_a_plan_of_the_stem_tells_its_tile(batch, tile, built, monkeypatch):
    monkeypatch.setattr(torch.ops.resnet_fast, "_stem_pool_cuda", Op(), raising=False)
    spec = ConvSpec(batch, 224, 224, 3, 64, 7, 7, (2, 2), (3, 3), norm=True)
    images = StemProblem(conv=problem(spec))
    assert str(table.plan(images, "cuda").tile).startswith(tile)
    assert table.plan(images, "triton").tile == heuristics.choose(spec, 80, TRITON)
    assert table.plan(images, "aten").tile is None


def test_an_old_gpu_has_no_preference():
    assert preferences.preference(LARGE, 75) is None


def test_a_layer_beyond_the_reach_of_mma_sync_is_tritons():
    """246 operations a byte: fewer than an H100 can do meanwhile, but more than by mma.sync."""
    spec = ConvSpec(32, 14, 14, 512, 512, 1, 1)
    h100 = _hardware.GPUS[90]
    intensity = spec.flops / spec.bytes_minimum
    assert intensity < h100.tflops_fp16 * 1e3 / h100.bandwidth_gbs
    assert intensity > _hardware.mma_sync_share(h100) * h100.tflops_fp16 * 1e3 / h100.bandwidth_gbs
    assert preferences.preference(spec, h100).order[0] == "triton"
    assert preferences.preference(replace(spec, c=64, k=64), h100).order[0] == "cuda"


@pytest.mark.parametrize(("arch", "slower"), [(80, False), (89, False), (90, True), (100, True)])
def test_each_family_is_scored_by_what_its_instructions_reach(arch, slower):
    spec = ConvSpec(256, 14, 14, 1024, 1024, 3, 3, (1, 1), (1, 1))
    gpu, tile = _hardware.GPUS[arch], CUDA_TILES[0]
    ours, tritons = (family.cost(spec, tile, gpu) for family in (CUDA, TRITON))
    assert ours.limited_by == "tensor" or not slower
    assert (ours.microseconds > 1.3 * tritons.microseconds) == slower
    low = replace(tile, BLOCK_M=32, BLOCK_N=128)  # too few rows for wgmma
    both = {family.cost(spec, low, gpu).microseconds for family in (CUDA, TRITON)}
    assert len(both) == 1
