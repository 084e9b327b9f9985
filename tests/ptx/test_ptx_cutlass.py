# SPDX-License-Identifier: Apache-2.0
"""Calibration: a known-good kernel of others, NVIDIA's CUTLASS convolution, must run clean."""

import importlib.util
import pathlib
import shutil
import subprocess

import numpy as np
import pytest
from ptx_helpers import assert_close, conv64

from resnet_fast.testing import ptx

CASES = {  # N, H, W, C, K, R, S, padding, stride
    "3x3": (1, 12, 11, 64, 96, 3, 3, 1, 1),
    "3x3-stride2": (2, 9, 13, 32, 40, 3, 3, 1, 2),
    "1x1": (1, 14, 14, 96, 136, 1, 1, 0, 1),
    "1x1-stride2": (3, 7, 7, 64, 32, 1, 1, 0, 2),
}


@pytest.fixture(scope="module")
def cutlass(tmp_path_factory):
    """(PTX text, host program), compiled by nvcc in a few seconds."""
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
    return (folder / "cutlass_conv.ptx").read_text(), folder / "host"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_conv2d_fprop(cutlass, case):
    text, host = cutlass
    n, h, w, c, k, r, s, padding, stride = case
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, h, w, c)).astype(np.float16)
    weight = (rng.standard_normal((k, r, s, c)) / np.sqrt(r * s * c)).astype(np.float16)
    reference = np.maximum(conv64(x, weight, stride, padding), 0)
    y = np.full(reference.shape, np.nan, np.float16)
    addresses = [str(ptx.address_of(a)) for a in (x, weight, y)]
    command = [host, *map(str, case), *addresses]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    gx, gy, gz, threads, shared = (int(v) for v in output[:5])
    kernel = ptx.Module(text).kernel("ImplicitGemmConvolution")
    run = kernel.launch((gx, gy, gz), threads, [bytes.fromhex(output[5])], shared)
    assert_close(y, reference, 2.0**-10, r * s * c)
    assert run.counters.bank_conflicts == 0
    tiles = gx * gy * gz
    assert run.counters.tensor_macs == tiles * 128 * 128 * (-(-c // 32) * 32) * r * s
