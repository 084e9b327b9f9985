# SPDX-License-Identifier: Apache-2.0
"""When two results agree: one rule for tests, benchmarks, `compare` and `optimize(verify=True)`.

    error(y) = max |y - reference64| / max |reference64|
    error(ours) <= FACTOR * error(eager) + eps(dtype) / 2 + sqrt(K_gemm) * eps(float32)

Both results are compared with float64, since a result with other rounding errors is not a
reference. The factor two leaves room for another order of summation. The floor is for the case
that eager happens to be exact: half an ulp of the output's dtype, as one rounding may fall the
other way, and the error of a random sum of K_gemm products in the fp32 accumulator. After
FlashAttention's rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 2.0


def error(y: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest magnitude of the float64 reference.

    NaN if the two do not have NaNs and infinities in the same places.
    """
    y = y.double()
    finite = reference.isfinite()
    special = reference[~finite]
    if not ((y[~finite] == special) | (y[~finite].isnan() & special.isnan())).all():
        return math.nan
    if not finite.any():
        return 0.0
    scale = reference[finite].abs().max().clamp_min(1e-30)
    return ((y[finite] - reference[finite]).abs().max() / scale).item()


def bound(eager_error: float, dtype: torch.dtype, k_gemm: int = 1) -> float:
    """The largest error that ours may have where eager torch has `eager_error`.

    Args:
        eager_error: `error` of eager torch at the same dtype.
        dtype: of both results.
        k_gemm: products per output element; 1 if nothing is summed.
    """
    rounding = torch.finfo(dtype).eps / 2
    summation = math.sqrt(k_gemm) * torch.finfo(torch.float32).eps
    return FACTOR * eager_error + rounding + summation


@dataclass(frozen=True, slots=True)
class Verdict:
    """Two errors against float64, and whether ours is small enough beside eager's."""

    ours: float
    eager: float
    limit: float

    @property
    def agrees(self) -> bool:
        return self.ours <= self.limit  # False for NaN

    def __str__(self) -> str:
        sign = "<=" if self.agrees else "exceeds"
        return f"error {self.ours:.3g} {sign} {self.limit:.3g} (eager's own is {self.eager:.3g})"


def compare(ours: Tensor, eager: Tensor, reference: Tensor, k_gemm: int = 1) -> Verdict:
    """Judge ours beside eager, both against the float64 reference, all of one shape.

    Example:
        >>> compare(fused(x), model(x), model.double()(x.double())).agrees
        True
    """
    theirs = error(eager, reference)
    return Verdict(error(ours, reference), theirs, bound(theirs, ours.dtype, k_gemm))
