# SPDX-License-Identifier: Apache-2.0
"""CUTLASS's convolution, compiled once for all tests that calibrate the machine with it."""

import importlib.util
import pathlib
import shutil
import subprocess

import numpy as np
import ptx_gpu
import pytest
from ptx_helpers import conv64

from resnet_fast.testing import ptx


class CutlassConv:
    """The kernel's PTX, and its launch as its own host code sets it up."""

    def __init__(self, text: str, host: pathlib.Path):
        self.text, self.host = text, host

    def run(self, case, text=None):
        """(y, float64 reference, run, tiles) of (N, H, W, C, K, R, S, padding, stride)."""
        n, h, w, c, k, r, s, padding, stride = case
        rng = np.random.default_rng(0)
        x = rng.standard_normal((n, h, w, c)).astype(np.float16)
        weight = (rng.standard_normal((k, r, s, c)) / np.sqrt(r * s * c)).astype(np.float16)
        reference = np.maximum(conv64(x, weight, stride, padding), 0)
        y = np.full(reference.shape, np.nan, np.float16)
        addresses = [str(ptx.address_of(a)) for a in (x, weight, y)]
        command = [self.host, *map(str, case), *addresses]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        *grid, threads, shared = (int(v) for v in output[:5])
        kernel = ptx.Module(text or self.text).kernel("ImplicitGemmConvolution")
        run = kernel.launch(grid, threads, [bytes.fromhex(output[5])], shared)
        return y, reference, run, int(np.prod(grid))


@pytest.fixture(scope="session")
def cutlass_conv(tmp_path_factory) -> CutlassConv:
    library = importlib.util.find_spec("cutlass_library")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    if library is None:
        pytest.skip("CUTLASS's headers are not installed: pip install --no-deps nvidia-cutlass")
    include = pathlib.Path(library.submodule_search_locations[0]) / "source" / "include"
    folder = tmp_path_factory.mktemp("cutlass")
    source = pathlib.Path(__file__).with_name("cutlass_conv.cu")
    subprocess.run(
        ["nvcc", "-std=c++17", "-w", "-gencode", "arch=compute_80,code=compute_80", "-I", include]
        + ["--keep", "--keep-dir", folder, source, "-o", folder / "host"],
        check=True,
        capture_output=True,
    )
    return CutlassConv((folder / "cutlass_conv.ptx").read_text(), folder / "host")


@pytest.fixture(params=["machine", pytest.param("gpu", marks=pytest.mark.gpu)])
def place(request, monkeypatch):
    """Where a test's kernels run: on the machine, or the same text and data on a real GPU."""
    if request.param == "gpu":
        if not ptx_gpu.available():
            pytest.skip("no NVIDIA GPU")
        monkeypatch.setattr(ptx.Kernel, "launch", ptx_gpu.launch)
