# SPDX-License-Identifier: Apache-2.0
"""Who computes the gradient of `add_relu`: the backend of its forward, or torch's own function."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from resnet_fast import _hardware
from resnet_fast.dispatch import backends
from resnet_fast.dispatch.problem import on_device_of
from resnet_fast.kernels import aten


def add_relu_backward(grad: Tensor, y: Tensor) -> Tensor:
    """grad where y, the result of add_relu, is not 0 or less; else 0. In grad's memory order."""
    chosen, _ = backends.explain_add_relu(str(grad.device), str(grad.dtype).removeprefix("torch."))
    dense = grad.is_contiguous() or (
        grad.dim() == 4 and grad.is_contiguous(memory_format=torch.channels_last)
    )
    if chosen not in ("cuda", "triton") or not dense or grad.stride() != y.stride():
        return aten.add_relu_backward(grad, y)
    out = torch.empty_like(grad)
    if grad.numel() == 0:
        return out
    if chosen == "cuda":
        torch.ops.resnet_fast._add_relu_backward_cuda.default(grad, y, out)
        return out
    from resnet_fast.kernels import add_relu as kernel

    aligned = kernel.is_aligned(grad, y, out)
    with on_device_of(grad):
        _triton_launch(grad.numel(), grad.dtype, aligned, grad.device)(grad, y, out)
    return out


@functools.lru_cache(maxsize=1024)
def _triton_launch(numel: int, dtype: torch.dtype, aligned: bool, device: torch.device):
    from resnet_fast.kernels import add_relu as kernel

    arch = backends.INTERPRETED_ARCH
    if device.type == "cuda":
        arch = _hardware.capability_of(device)
    return kernel.build(numel, dtype, aligned, arch=arch, gradient=True)
