# SPDX-License-Identifier: Apache-2.0
"""The one tolerance rule: at most twice the error that eager torch makes at the same dtype.

    error(y) = max |y - reference64| / max |reference64|
    error(ours) <= 2 * error(eager) + eps(dtype) / 2 + sqrt(K_gemm) * eps(float32)

The factor two leaves room for another order of summation, the floor for a case where eager happens
to round exactly; sqrt(K_gemm) is how the error of a random sum of K_gemm products grows, and
the summation floor uses the accumulator's eps (fp32), the rounding floor the output's.
After FlashAttention's rule: compare with a high-precision reference, not with another rounding.
"""

from __future__ import annotations

import math

import torch

FACTOR = 2.0
FLOOR_ULPS = 1.0  # of the output dtype: one rounding of ours may fall the other way


def error(y: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest absolute difference over the largest magnitude of the fp64 reference."""
    scale = reference.abs().max().clamp_min(1e-30)
    return ((y.double() - reference).abs().max() / scale).item()


def bound(eager_error: float, dtype: torch.dtype, k_gemm: int) -> float:
    """The largest error that a kernel may make where eager torch makes `eager_error`."""
    rounding = FLOOR_ULPS * torch.finfo(dtype).eps / 2
    summation = math.sqrt(k_gemm) * torch.finfo(torch.float32).eps
    return FACTOR * eager_error + rounding + summation


def assert_within(
    y: torch.Tensor,
    eager: torch.Tensor,
    reference: torch.Tensor,  # fp64
    k_gemm: int,
    label: str = "",
) -> None:
    """Raise AssertionError unless y is within `bound` of the reference and has no stray NaN."""
    assert y.shape == reference.shape, (
        f"{label}: shape {tuple(y.shape)}, not {tuple(reference.shape)}"
    )
    assert not torch.isnan(y).any() or torch.isnan(reference).any(), f"{label}: NaN was left in y"
    ours, theirs = error(y, reference), error(eager, reference)
    limit = bound(theirs, y.dtype, k_gemm)
    assert ours <= limit, f"{label}: error {ours:.3g} exceeds {limit:.3g} (eager's is {theirs:.3g})"
