# SPDX-License-Identifier: Apache-2.0
"""Calibration: known-good kernels of others, NVIDIA's CUTLASS convolutions, must run clean."""

import numpy as np
import pytest
from ptx_helpers import assert_close

CASES = {  # N, H, W, C, K, R, S, padding, stride
    "3x3": (1, 12, 11, 64, 96, 3, 3, 1, 1),
    "3x3-stride2": (2, 9, 13, 64, 40, 3, 3, 1, 2),
    "1x1": (1, 14, 14, 128, 136, 1, 1, 0, 1),
    "1x1-stride2": (3, 7, 7, 64, 32, 1, 1, 0, 2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_conv2d_fprop(cutlass_conv, case):
    """mma.sync, ldmatrix and cp.async; with a ReLU."""
    y, reference, run, tiles = cutlass_conv.run(case)
    _, _, _, c, _, r, s, _, _ = case
    assert_close(y, np.maximum(reference, 0), 2.0**-10, r * s * c)
    assert run.counters.bank_conflicts == 0
    assert run.counters.tensor_macs == tiles * 128 * 128 * r * s * c


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_conv2d_fprop_for_sm90(cutlass_conv_sm90, case):
    """A producer warp, im2col tensor copies both ways, wgmma, setmaxnreg."""
    y, reference, run, tiles = cutlass_conv_sm90.run(case)
    _, _, _, c, _, r, s, _, _ = case
    assert_close(y, reference, 2.0**-10, r * s * c)
    assert run.counters.bank_conflicts == 0
    assert run.counters.tensor_macs == tiles * 128 * 128 * r * s * c
