# SPDX-License-Identifier: Apache-2.0
"""The ops written with torch's own functions: their definition, and the backend of last resort.

Whatever no fused kernel takes (fp64, groups on a GPU, unusual layouts) runs here, unfused but
right, so these few lines are also the reference that tests and benchmarks compare with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_bn_act(
    x: Tensor,  # [N, H, W, C]
    weight: Tensor,  # [K, R, S, C / groups]
    scale: Tensor,  # [K]
    shift: Tensor,  # [K]
    residual: Tensor | None,  # [N, P, Q, K]
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    mean: Tensor | None,  # [K]
    var: Tensor | None,  # [K]
    eps: float,
) -> Tensor:  # [N, P, Q, K]
    """act((conv(x, weight) - mean) / sqrt(var + eps) * scale + shift + residual), step by step."""
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    if mean is None or var is None:
        y = torch.addcmul(per_channel(shift), y, per_channel(scale)).to(x.dtype)
    else:
        vectors = (mean, var, scale, shift)
        if any(v.dtype != x.dtype for v in vectors):  # torch takes x's dtype or fp32, not a mixture
            vectors = [v.to(torch.promote_types(x.dtype, torch.float32)) for v in vectors]
        y = F.batch_norm(y, *vectors, False, 0.0, eps)
    if residual is not None:
        y = y + residual
    if activation == "relu":
        y = F.relu(y)
    return y.contiguous(memory_format=torch.channels_last)


def add_relu(
    x: Tensor,  # any shape
    y: Tensor,  # x's shape
) -> Tensor:
    """relu(x + y), rounded once to the dtype between the two."""
    return F.relu(x + y)


def add_relu_backward(
    grad: Tensor,  # any shape
    y: Tensor,  # grad's shape: what add_relu returned
) -> Tensor:
    """grad where y is not 0 or less, else 0; the gradient of add_relu along each argument."""
    return torch.ops.aten.threshold_backward(grad, y, 0)


def per_channel(vector: Tensor) -> Tensor:
    """A [K] vector in fp32 (or wider) as [1, K, 1, 1], to broadcast over [N, K, P, Q]."""
    wide = vector if vector.dtype == torch.float64 else vector.float()
    return wide.view(1, -1, 1, 1)
