# SPDX-License-Identifier: Apache-2.0
"""The extension, built for one architecture and loaded without a GPU: what it holds and refuses.

Every check of the launchers is made with CPU tensors; that a tensor is not on a GPU comes last, so
a call that is right in all else says so.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from resnet_fast import build, ops
from resnet_fast.dispatch import tiles as table
from tests.extension import calls, models
from tests.support import nvcc

JOIN_OP = ops.CONV_BN_JOIN.name
ROOT = Path(__file__).resolve().parents[2]
ONE_FORM = re.compile(r"ValueError: resnet_fast::\w+: .+ must be .+, got .+; .+")
LACKS_A_GPU = "x must be on a CUDA device"


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """(folder of the module, what the command printed): built as a user builds it, for 8.0 only."""
    try:
        build.find()
    except build.BuildError as error:
        pytest.skip(f"the extension cannot be built here: {error}")
    folder = tmp_path_factory.mktemp("extension")
    command = ("-m", "resnet_fast.cli", "build", "--arch", "8.0", "--verbose", "--into")
    wide = {**os.environ, "COLUMNS": "200"}  # readline sets it to 80, if a debugger imported that
    done = subprocess.run(
        [sys.executable, *command, str(folder)], cwd=ROOT, env=wide, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.fixture(scope="session")
def extension(built):
    """extension(function of `calls`, *args): run it in a process that has the extension loaded."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, calls.load, (str(built[0]),)) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def test_the_report_names_kernels_registers_and_no_spill(built):
    text = built[1]
    assert "GPUs     8.0; newer ones by PTX of 8.0" in text
    for op, count in (
        ("add_relu", 12),
        ("conv_bn_act", 51),
        (JOIN_OP, 18),
        ("stem_pool", 6),
    ):
        assert re.search(rf"kernels  {op}: {count}, \d+ to \d+ registers, none with spills", text)
    assert re.search(r"conv_bn_act<float16, Tile<128, 128, 64.*registers 8\.0: \d+", text)


def test_it_says_what_it_holds(extension):
    facts = extension(calls.facts)
    assert facts["architectures"] == [80] and facts["ptx"] == 80
    assert len(facts["kernels"]["conv_bn_act"]) == len(facts["tiles"]["conv_bn_act"]) * 6 + 3
    assert (
        "conv_bn_act<float16, 128x128x64 stages 3 warps 2x2, pointwise>"
        in (facts["kernels"]["conv_bn_act"])
    )
    refusals = facts["refusals"]
    assert "below 8.0" in refusals.pop(75) and not any(refusals.values())
    assert facts["explain"][0] and "for 8.0" in facts["explain"][1]
    if not torch.cuda.is_available():
        assert facts["missing"] == "torch sees no NVIDIA GPU" and facts["driver"]


def test_a_kernels_resources_are_asked_of_a_gpu(extension):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert re.match(
        r"RuntimeError: .*asked of a GPU.*resnet-fast build", extension(calls.resources)
    )


@pytest.mark.parametrize("op", ["add_relu", "conv_bn_act", JOIN_OP])
def test_the_table_in_the_source_is_what_runs(op, extension):
    """Other tests read the tables as text."""
    tiles = extension(calls.facts)["tiles"].get(op, [])
    text = (build.csrc() / "cuda" / f"{op}.cu").read_text()
    table = re.search(r"Tiles = TileList<(.*?)>>;", text, re.DOTALL)
    rows = re.findall(r"Tile<(\d+), (\d+), (\d+), (\d+), (\d+), (\d+)>?", table[1]) if table else []
    assert [tuple(map(int, row)) for row in rows] == [tuple(tile) for tile in tiles]
    assert len(rows) <= 12


ELEMENTWISE = {
    "good": None,
    "in-place": None,
    "integer": ("", "float16, bfloat16 or float32", "int32"),
    "double": ("", "float16, bfloat16 or float32", "float64"),
    "dtype": ("y", "float16", "float32"),
    "shape": ("y", "[2, 8, 4, 4]", "[1, 8, 4, 4]"),
    "rank": ("y", "[2, 8, 4, 4]", "[8, 4, 4]"),
    "out-shape": ("out", "[2, 8, 4, 4]", "[1, 8, 4, 4]"),
    "layout": ("y", "channels_last", "contiguous"),
    "out-layout": ("out", "channels_last", "contiguous"),
    "strided": ("", "dense", "strided"),
    "folded": ("", "dense", "strided [1, 1, 5]"),
    "expanded": ("", "dense", "strided [0]"),
    "overlap-x": ("out", "apart from", "beside"),
    "overlap-y": ("out", "apart from y", "beside"),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_add_relu_refuses(name, backward, extension):
    error = extension(calls.elementwise, backward, name)
    first = "grad" if backward else "x"
    wanted = ELEMENTWISE[name] or (first, "on a CUDA device", "cpu")
    check(error, wanted[0] or first, *wanted[1:])


# id -> argument, in "expected", in "got"
CONVOLUTION = {
    "good": None, "in-place": None, "no-residual": None, "no-norm": None, "slice-of-channels": None,
    "split": None,
    "x-3d": ("x", "4-D", "[16, 6, 7]"),
    "x-integer": ("x", "float16", "int32"),
    "x-double": ("x", "float16", "float64"),
    "x-contiguous": ("x", "channels_last", "contiguous"),
    "x-strides": ("x", "strides that are multiples of 16 bytes", "strided [840, 1, 140, 20]"),
    "x-address": ("x", "multiple of 16 bytes", "address 0x"),
    "x-channels": ("x", "multiple of 8 channels", "[2, 12, 6, 7]"),
    "x-small": ("x", "as large as the filter", "[2, 16, 1, 1]"),
    "x-far": ("bytes of x between", "4294967295", "4294968896"),
    "x-taps": ("elements of x between", "2147483647", "2621600016"),
    "x-none-of-many-pixels": ("P * Q", "2147483391", "4294967296"),
    "weight-dtype": ("weight", "float16", "float32"),
    "weight-groups": ("weight", "[24, 16, 3, 3]", "[24, 8, 3, 3]"),
    "weight-layout": ("weight", "channels_last", "contiguous"),
    "weight-address": ("weight", "multiple of 16 bytes", "address 0x"),
    "weight-filters": ("weight", "multiple of 8 filters", "[20, 16, 3, 3]"),
    "weight-taps": ("weight's height", "15", "16"),
    "stride": ("stride", "from 1", "0"),
    "stride-length": ("length of stride", "from 2 to 2", "1"),
    "padding": ("padding", "from 0", "-1"),
    "dilation": ("dilation", "from 1", "0"),
    "scale-shape": ("scale", "[24]", "[23]"),
    "scale-dtype": ("scale", "float32", "float64"),
    "scale-strided": ("scale", "contiguous", "strided [2]"),
    "scale-address": ("scale", "multiple of 16 bytes", "address 0x"),
    "mean-alone": ("var", "beside mean", "None"),
    "var-alone": ("mean", "beside var", "None"),
    "residual-shape": ("residual", "[2, 24, 3, 4]", "[2, 24, 4, 4]"),
    "residual-layout": ("residual", "channels_last", "contiguous"),
    "residual-dtype": ("residual", "float16", "float32"),
    "out-shape": ("out", "[2, 24, 3, 4]", "[2, 24, 3, 3]"),
    "out-layout": ("out", "channels_last", "contiguous"),
    "out-address": ("out", "multiple of 16 bytes", "address 0x"),
    "out-in-x": ("out", "apart from x", "beside"),
    "out-in-weight": ("out", "apart from weight", "beside"),
    "out-beside-residual": ("out", "apart from residual", "beside"),
    "tile-high": ("tile", "from 0 to 7", "99"),
    "tile-negative": ("tile", "from 0 to 7", "-1"),
    "split-none": ("split_k", "from 1 to 3", "0"),
    "split-many": ("split_k", "from 1 to 3", "4"),
    "workspace-missing": ("workspace", "above 1", "None"),
    "workspace-small": ("workspace", "1152 elements", "[1151]"),
    "workspace-dtype": ("workspace", "float32", "float16"),
    "workspace-address": ("workspace", "multiple of 16 bytes", "address 0x"),
    "workspace-is-out": ("workspace", "apart from out", "beside"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVOLUTION)
def test_conv_bn_act_refuses(name, extension):
    wanted = CONVOLUTION[name] or ("x", "on a CUDA device", "cpu")
    check(extension(calls.conv_error, name), *wanted)


JOIN = {
    "good": None,
    "window": None,
    "even-window": ("weight", "odd height and width", "[24, 16, 2, 2]"),
    "projection-window": ("proj_weight", "1x1", "[24, 8, 3, 3]"),
    "x-shape": ("out", "[2, 24, 4, 4]", "[2, 24, 3, 4]"),
    "x-dtype": ("out", "float32", "float16"),
    "x-channels": ("x", "multiple of 8 channels", "[2, 12, 6, 7]"),
    "out-is-h": ("out", "apart from h", "beside"),
    "tile": ("tile", "from 0 to 2", "3"),
    "proj_mean-alone": ("proj_var", "beside mean", "None"),
}


@pytest.mark.parametrize("name", JOIN)
def test_a_join_refuses(name, extension):
    wanted = JOIN[name] or ("h", "on a CUDA device", "cpu")
    check(extension(calls.join_error, name), *wanted)


STEM = {
    **dict.fromkeys(("good", "nchw", "sliced", "bytes", "bytes-nchw", "no-norm", "float32")),
    "x-3d": ("x", "4-D", "[3, 21, 30]"),
    "x-none-of-many-tiles": ("tiles of an image", "2147483647", "4908580864"),
    "x-channels": ("x", "3 channels", "[2, 4, 21, 30]"),
    "x-dtype": ("x", "float16", "float32"),
    "weight-shape": ("weight", "[16, 3, 7, 7]", "[16, 3, 5, 5]"),
    "weight-layout": ("weight", "channels_last", "contiguous"),
    "weight-filters": ("weight", "multiple of 8 filters", "[12, 3, 7, 7]"),
    "weight-double": ("weight", "float32", "float64"),
    "scale": ("scale", "[16]", "[15]"),
    "mean-alone": ("var", "beside mean", "None"),
    "image_mean-of-floats": ("image_mean", "absent", "[3]"),
    "image_std-shape": ("image_std", "[3]", "[4]"),
    "image_std-dtype": ("image_std", "float32", "float16"),
    "out-shape": ("out", "[2, 16, 6, 8]", "[2, 16, 7, 8]"),
    "out-dtype": ("out", "float16", "float32"),
    "out-address": ("out", "multiple of 16 bytes", "address 0x"),
    "out-in-x": ("out", "apart from x", "beside"),
    "tile": ("tile", "from 0 to 1", "2"),
}


@pytest.mark.parametrize("name", STEM)
def test_stem_pool_refuses(name, extension):
    check(extension(calls.stem_error, name), *(STEM[name] or ("x", "on a CUDA device", "cpu")))


@pytest.mark.parametrize("name", [name for name, wanted in STEM.items() if wanted is None])
def test_the_stems_struct_is_the_mirrors(name, extension):
    """The mirror is what the kernel's tests launch."""
    host, mirror = extension(calls.stem_problem, name)
    assert host == mirror


def test_the_tables_are_the_choosers(extension):
    """Of a GEMM's tile the extension tells rows and columns of warps, the chooser their number."""
    found = extension(calls.facts)["tiles"]
    assert len(table.CUDA_TILES) == 3
    for op in ops.OPS.values():
        held = table.CUDA_TILES.get(type(op.typical("float16")), ())
        fields = [tuple(v for v in astuple(tile) if isinstance(v, int)) for tile in held]
        told = [tuple(tile) for tile in found.get(op.name, [])]
        told = [(*t[:4], t[4] * t[5]) if len(t) == 6 else t for t in told]
        assert [f[: len(t)] for f, t in zip(fields, told, strict=True)] == told, op.name


def check(error: str, argument: str, expected: str, got: str) -> None:
    """An error of the one form that names the argument, what was expected and what was given."""
    assert ONE_FORM.fullmatch(error), error
    before, _, after = error.partition(" must be ")
    said, _, given = after.partition(", got ")
    assert before.rpartition("cuda: ")[2].startswith(argument), error
    assert expected in said and got in given.rpartition("; ")[0], error


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", ["good", "no-residual", "no-norm", "slice-of-channels", "split"])
def test_the_struct_is_what_the_arguments_say(name, dtype, extension):
    """The bytes that would be launched, through the Python mirror that the kernels' tests use."""
    data, told = extension(calls.conv_problem, name, dtype)
    p = nvcc.ConvProblem.from_buffer_copy(data)
    x, weight, out = told["x"], told["weight"], told["out"]
    assert (p.x, p.weight, p.y) == (x[0], weight[0], out[0])
    assert p.residual == (told["residual"][0] if told["residual"] else None)
    assert p.workspace == (told["workspace"][0] if told["split_k"] > 1 else None)
    for key in ("scale", "shift", "mean", "var"):
        vector = getattr(p.norm, key)
        assert vector.data == (told[key][0] if told[key] else None)
        if told[key]:
            assert vector.dtype == nvcc.DTYPES[str(told[key][3]).removeprefix("torch.")]
    assert p.norm.eps == pytest.approx(told["eps"], rel=1e-6)
    assert (p.stride_n, p.stride_h, p.stride_w) == (x[2][0], x[2][2], x[2][3])
    assert (p.c, p.h, p.w) == x[1][1:]
    assert (p.k, p.c, p.r, p.s) == weight[1]
    n, k, height, width = out[1]
    assert p.m == n * height * width and p.k == k
    assert (p.conv_stride_h, p.conv_stride_w) == told["stride"]
    assert (p.padding_h, p.padding_w) == told["padding"]
    assert (p.dilation_h, p.dilation_w) == told["dilation"]
    products = 64 // (2 if dtype == "float32" else 1)
    steps = -(-p.r * p.s * p.c // products)
    assert (p.split_k, p.steps_per_split) == (told["split_k"], -(-steps // told["split_k"]))
    assert p.relu == 1
    block_n = 128 if told["tile"] == 0 else 64
    divisors = {
        "pixels": height * width, "q": width, "c_of": p.c, "s_of": p.s, "tiles_n": -(-k // block_n)
    }  # fmt: skip
    for field, divisor in divisors.items():
        mirror = nvcc.Divisor.of(divisor)
        assert bytes(getattr(p, field)) == bytes(mirror), field
    # one step of the walk, from the odometer's definition
    position = [0, 0, 0]
    for _ in range(products):
        position[0] += 1
        if position[0] == p.c:
            position[0], position[1] = 0, position[1] + 1
        if position[1] == p.s:
            position[1], position[2] = 0, position[2] + 1
    assert [p.walk.c, p.walk.s, p.walk.r] == position
    down, across = p.dilation_h * p.stride_h, p.dilation_w * p.stride_w
    assert p.walk.offset == position[0] + position[1] * across + position[2] * down
    assert (p.walk.carry_c, p.walk.carry_s) == (across - p.c, down - p.s * across)


@pytest.mark.parametrize(
    ("name", "dtype", "convolutions", "joins"),
    [("resnet18", "bfloat16", 13, 3), ("resnet50", "float16", 44, 4)],
)
def test_whole_models_pass_the_launchers_checks(name, dtype, convolutions, joins, extension):
    launched = extension(models.run, name, dtype)
    whole = {"stem_pool": 1, "conv_bn_act": convolutions, JOIN_OP: joins}
    assert launched.pop("none") == {}
    assert launched == dict.fromkeys(launched, whole)
