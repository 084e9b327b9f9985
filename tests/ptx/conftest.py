# SPDX-License-Identifier: Apache-2.0
"""CUTLASS's convolutions, compiled once for all tests that calibrate the machine with them."""

import importlib.util
import pathlib
import shutil
import subprocess

import numpy as np
import ptx_gpu
import pytest
from ptx_helpers import conv64

from resnet_fast.testing import ptx

SWIZZLE = (0, 32, 64, 128)  # bytes, by CUtensorMapSwizzle


class CutlassConv:
    """A kernel's PTX, and its launch as its own host code sets it up."""

    def __init__(self, text: str, host: pathlib.Path):
        self.text, self.host = text, host

    def run(self, case, text=None):
        """(y, float64 reference, run, tiles) of (N, H, W, C, K, R, S, padding, stride)."""
        n, h, w, c, k, r, s, padding, stride = case
        rng = np.random.default_rng(0)
        x = rng.standard_normal((n, h, w, c)).astype(np.float16)
        weight = (rng.standard_normal((k, r, s, c)) / np.sqrt(r * s * c)).astype(np.float16)
        reference = conv64(x, weight, stride, padding)
        y = np.full(reference.shape, np.nan, np.float16)
        arrays = {ptx.address_of(a): a for a in (x, weight, y)}
        command = [self.host, *map(str, case), *map(str, arrays)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        *maps, launch, block = output.splitlines()
        params = bytearray.fromhex(block)
        maps = [tensor_map(line, arrays) for line in maps]
        for i, map_ in enumerate(maps):  # CUTLASS keeps some maps more than once
            params = params.replace(f"TENSORMAP{i}".encode().ljust(128, b"\0"), map_.encode())
        *grid, threads, shared = map(int, launch.split())
        kernel = ptx.Module(text or self.text, strict=False).kernel("")  # the launch is strict
        run = kernel.launch(grid, threads, [bytes(params)], shared)
        return y, reference, run, int(np.prod(grid))


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


def compile_cutlass(name: str, arch: str, folder: pathlib.Path) -> CutlassConv:
    library = importlib.util.find_spec("cutlass_library")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    if library is None:
        pytest.skip("CUTLASS's headers are not installed: pip install --no-deps nvidia-cutlass")
    root = pathlib.Path(library.submodule_search_locations[0]) / "source"
    include = ["-I", root / "include", "-I", root / "tools" / "util" / "include"]
    source = pathlib.Path(__file__).with_name(f"{name}.cu")
    subprocess.run(
        ["nvcc", "-std=c++17", "-w", "--expt-relaxed-constexpr", *include]
        + ["-gencode", f"arch=compute_{arch},code=compute_{arch}"]
        + ["--keep", "--keep-dir", folder, source, "-o", folder / "host"],
        check=True,
        capture_output=True,
    )
    return CutlassConv((folder / f"{name}.ptx").read_text(), folder / "host")


@pytest.fixture(scope="session")
def cutlass_conv(tmp_path_factory) -> CutlassConv:
    return compile_cutlass("cutlass_conv", "80", tmp_path_factory.mktemp("cutlass"))


@pytest.fixture(scope="session")
def cutlass_conv_sm90(tmp_path_factory) -> CutlassConv:
    return compile_cutlass("cutlass_conv_sm90", "90a", tmp_path_factory.mktemp("cutlass_sm90"))


@pytest.fixture(params=["machine", pytest.param("gpu", marks=pytest.mark.gpu)])
def place(request, monkeypatch):
    """Where a test's kernels run: on the machine, or the same text and data on a real GPU."""
    if request.param == "gpu":
        if not ptx_gpu.available():
            pytest.skip("no NVIDIA GPU")
        monkeypatch.setattr(ptx.Kernel, "launch", ptx_gpu.launch)
