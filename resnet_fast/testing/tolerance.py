# SPDX-License-Identifier: Apache-2.0
"""The tolerance rule of `resnet_fast/agreement.py` as an assertion."""

from __future__ import annotations

from torch import Tensor

from resnet_fast.agreement import bound, compare, error


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


__all__ = ["assert_within", "bound", "compare", "error"]
