# SPDX-License-Identifier: Apache-2.0
"""CUTLASS's convolutions, compiled once for all tests that calibrate the machine with them."""

import pathlib

import numpy as np
import ptx_gpu
import pytest
from ptx_helpers import conv64

from softgpu import ptx
from tests.support import cutlass

SWIZZLE = (0, 32, 64, 128)  # bytes, by CUtensorMapSwizzle


class CutlassConv:
    """A kernel of CUTLASS, run as its own host code sets it up."""

    def __init__(self, program: cutlass.Program, addresses):
        self.program, self.text, self.addresses = program, program.ptx, addresses

    def run(self, case, text=None):
        """(y, float64 reference, run, tiles) of (N, H, W, C, K, R, S, padding, stride)."""
        n, h, w, c, k, r, s, padding, stride = case
        rng = np.random.default_rng(0)
        x = rng.standard_normal((n, h, w, c)).astype(np.float16)
        weight = (rng.standard_normal((k, r, s, c)) / np.sqrt(r * s * c)).astype(np.float16)
        reference = conv64(x, weight, stride, padding)
        y = np.full(reference.shape, np.nan, np.float16)
        arrays = {ptx.address_of(a): a for a in (x, weight, y)}
        launch = self.program.launch(*case, *self.addresses(*arrays))
        params = launch.params
        maps = [tensor_map(line, arrays) for line in launch.lines]
        for i, map_ in enumerate(maps):  # CUTLASS keeps some maps more than once
            params = params.replace(f"TENSORMAP{i}".encode().ljust(128, b"\0"), map_.encode())
        kernel = ptx.Module(text or self.text, strict=False).kernel("")  # the launch is strict
        run = kernel.launch(launch.grid, launch.threads, [params], launch.shared_bytes)
        return y, reference, run, int(np.prod(launch.grid))


def tensor_map(line: str, arrays) -> ptx.TensorMap:
    """What the host program asked the driver for, as the machine's object."""
    kind, address, *values = line.split()
    array, values = arrays[int(address)], [int(v) for v in values]
    if kind == "tiled":  # the filter, its output channels next to the input channels
        array = array.transpose(1, 2, 0, 3)
    assert values[:4] == list(reversed(array.shape))
    swizzle = SWIZZLE[values[-1]]
    if kind == "tiled":
        return ptx.TensorMap(array, tuple(reversed(values[4:8])), swizzle)
    low_w, low_h, up_w, up_h, channels, pixels, step_w, step_h = values[4:12]
    return ptx.TensorMap(
        *(array, (pixels, channels), swizzle),
        lower=(low_h, low_w),
        upper=(up_h, up_w),
        stride=(step_h, step_w),
    )


def compile_cutlass(source: pathlib.Path, arch: str, folder, **macros: int) -> cutlass.Program:
    if reason := cutlass.missing():
        pytest.skip(reason)
    return cutlass.compile_program(source, arch, folder, **macros)


@pytest.fixture(scope="session")
def cutlass_conv(tmp_path_factory) -> CutlassConv:
    sizes = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "NUM_STAGES": 3}
    folder = tmp_path_factory.mktemp("cutlass")
    program = compile_cutlass(cutlass.SOURCE, "80", folder, **sizes)
    return CutlassConv(program, lambda x, weight, y: (x, weight, 0, y))


@pytest.fixture(scope="session")
def cutlass_conv_sm90(tmp_path_factory) -> CutlassConv:
    source = pathlib.Path(__file__).with_name("cutlass_conv_sm90.cu")
    program = compile_cutlass(source, "90a", tmp_path_factory.mktemp("cutlass_sm90"))
    return CutlassConv(program, lambda *addresses: addresses)


@pytest.fixture(params=["machine", pytest.param("gpu", marks=pytest.mark.gpu)])
def place(request, monkeypatch):
    """Where a test's kernels run: on the machine, or the same text and data on a real GPU."""
    if request.param == "gpu":
        if not ptx_gpu.available():
            pytest.skip("no NVIDIA GPU")
        monkeypatch.setattr(ptx.Kernel, "launch", ptx_gpu.launch)
