# SPDX-License-Identifier: Apache-2.0
"""relu(x + y), interpreted on the CPU, against eager torch."""

from __future__ import annotations

import pytest
import torch

from resnet_fast.kernels import add_relu
from tests.kernels import checks


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(1,), (7,), (2048,), (2049,), (2, 3, 5, 7), (2, 64, 14, 14)], ids=str
)
def test_matches_eager(interpret, shape, dtype):
    interpret(checks.add, shape, dtype, misaligned=False)


def test_misaligned(interpret):
    interpret(checks.add, (3, 1000), torch.float16, misaligned=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradient_matches_torch(interpret, dtype):
    interpret(checks.add_gradient, (2, 3, 5, 71), dtype)


def test_index_is_64_bits_where_it_must_be():
    (small,) = add_relu.launches(2**31 - 2**16, torch.float16, True)
    (large,) = add_relu.launches(2**31, torch.float16, True)
    assert not small.constants["INDEX64"]
    assert large.constants["INDEX64"] and "numel" in large.wide
