# SPDX-License-Identifier: Apache-2.0
"""The tolerance rule of `resnet_fast/agreement.py` as an assertion.

Where products are TF32, "eager" is eager fp32 on operands rounded to TF32: the same rounding, in
torch's own arithmetic, since a CPU has no TF32 of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.agreement import compare


def round_to_tf32(x: Tensor) -> Tensor:
    """fp32 rounded to the 10 bits of TF32's mantissa: to nearest, ties away from zero."""
    bits = x.view(torch.int32)
    rounded = (bits + 0x1000) & ~0x1FFF
    return torch.where(x.isfinite(), rounded.view(torch.float32), x)


def assert_within(
    y: Tensor,
    eager: Tensor,
    reference: Tensor,  # float64
    k_gemm: int,
    label: str = "",
) -> None:
    """Raise AssertionError unless y has the reference's shape and is as exact as the rule asks."""
    shapes = f"{tuple(y.shape)}, not {tuple(reference.shape)}"
    assert y.shape == reference.shape, f"{label}: shape {shapes}"
    verdict = compare(y, eager, reference, k_gemm)
    assert verdict.agrees, f"{label}: {verdict}"
