# SPDX-License-Identifier: Apache-2.0
"""The backend `cpu`: oneDNN's fused convolution on weights packed once (`kernels/cpu.py`)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fast.dispatch import steps
from resnet_fast.dispatch.problem import (
    Binder,
    ConvProblem,
    JoinProblem,
    StemProblem,
    SumProblem,
    binder,
    sum_refusal,
)
from resnet_fast.dispatch.row import Row
from resnet_fast.kernels import cpu as kernel


def conv_refusal(problem: ConvProblem) -> str | None:
    """Why oneDNN's fused convolution cannot take `problem`, or None."""
    if problem.x != "channels_last":
        return f"x is {problem.x}, not channels_last"
    if problem.residual not in ("", "channels_last"):
        return f"residual is {problem.residual}, not channels_last"
    if problem.weight not in ("channels_last", "contiguous"):
        return f"weight is {problem.weight}, neither contiguous nor channels_last"
    if not problem.vectors:
        return "scale, shift, mean or var is not contiguous"
    if not problem.tracked:
        return (
            "weight was made under torch.inference_mode(), so a packed copy could go stale unseen; "
            "build or load the model outside of it"
        )
    return kernel.refusal(problem.spec)


def conv_build(problem: ConvProblem, tile: None = None) -> Binder:
    return kernel.build(problem.spec)


def join_refusal(problem: JoinProblem) -> str | None:
    return conv_refusal(steps.adding(problem.main)) or conv_refusal(problem.projection)


def stem_refusal(problem: StemProblem) -> str | None:
    return conv_refusal(problem.normalized())


def _build_pool(problem: StemProblem) -> Callable[[Tensor], Tensor]:
    def pool(y: Tensor) -> Tensor:
        # It compares bit patterns, in which a NaN without its sign is the largest number.
        wide = y.element_size() == 4
        bits, magnitude = (torch.int32, 0x7FFFFFFF) if wide else (torch.int16, 0x7FFF)
        y.permute(0, 2, 3, 1).view(bits).bitwise_and_(magnitude)
        return kernel.max_pool_3x3_2(y)

    return pool


def sum_build(problem: SumProblem, tile: None = None) -> Binder:
    return binder(kernel.add_relu)


_row = functools.partial(Row, backend="cpu", device="cpu")
ROWS = (
    _row(ConvProblem.op, build=conv_build, refusal=conv_refusal),
    _row(JoinProblem.op, build=steps.join(conv_build), refusal=join_refusal),
    _row(StemProblem.op, build=steps.stem(conv_build, _build_pool), refusal=stem_refusal),
    _row(SumProblem.op, build=sum_build, refusal=sum_refusal),
)
