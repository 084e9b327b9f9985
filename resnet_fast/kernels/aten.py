# SPDX-License-Identifier: Apache-2.0
"""The ops written with torch's own functions: their definition, and the backend of last resort.

Whatever no fused kernel accepts (fp64, groups on a GPU, unusual layouts) runs here, unfused. These
few lines are also the reference for tests and benchmarks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.kernels import packed
from resnet_fast.spec import ELEMENT_SIZE, ConvSpec

_cudnn_relu = torch.ops.aten.cudnn_convolution_relu.default
_cudnn_add_relu = torch.ops.aten.cudnn_convolution_add_relu.default


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


# ---- cuDNN's fused convolution, as torch offers it: relu(conv(x, weight) + residual + bias)

# Never chosen automatically, because its ReLU is not known to pass NaN: torch builds the operation
# with cudnn-frontend's pointwise descriptor, whose default, which torch leaves, is
# CUDNN_NOT_PROPAGATE_NAN (aten/src/ATen/native/cudnn/Conv_v8.cpp; cudnn_frontend_PointWiseDesc.h).
CUDNN_BY_NAME = "only if chosen by name: its ReLU is not known to pass NaN"

CUDNN_WEIGHT_SHARE = 1 / 4  # of the output's bytes

# What it takes, each rule with its reason; the first rule that a spec breaks is the refusal.
CUDNN_RULES = (
    (
        lambda spec: spec.activation == "relu",
        "cuDNN's fused functions in torch all end in a ReLU",
    ),
    (
        lambda spec: spec.dtype in ("float16", "float32"),
        "BatchNorm's factor is folded into the weight at x's dtype: in bfloat16 that costs 1.4 "
        "times eager's error (emulated on a CPU; float16: 1.05), and cuDNN needed its newer API "
        "for it (pytorch#58861); float64 has no channels_last in cuDNN",
    ),
    (
        lambda spec: spec.groups == 1,
        "cuDNN's grouped channels_last convolutions may be 30 times slower (pytorch#34977)",
    ),
    (
        lambda spec: max(spec.r, spec.s) <= 3,
        "cuDNN's fused 7x7 channels_last convolution was 17 times slower (pytorch#68506)",
    ),
    (
        lambda spec: spec.c % 8 == 0 and spec.k % 8 == 0,
        "cuDNN's fused engines may not support few or odd channels (pytorch#62926)",
    ),
    (
        lambda spec: (
            spec.k * spec.k_gemm * ELEMENT_SIZE[spec.dtype]
            <= CUDNN_WEIGHT_SHARE * spec.m * spec.k * ELEMENT_SIZE[spec.dtype]
        ),
        "folding reads and writes the weight at each call, which pays only where it is at most a "
        "quarter of the output",
    ),
)


def cudnn_refusal(spec: ConvSpec) -> str | None:
    """Why cuDNN's fused convolution should not take `spec`, or None."""
    return next((reason for holds, reason in CUDNN_RULES if not holds(spec)), None)


def cudnn_conv_bn_act(
    x: Tensor,  # [N, H, W, C]
    weight: Tensor,  # [K, R, S, C]
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
    """relu(conv(x, weight * g) + residual + b), with BatchNorm as the factor g and the bias b.

    The factor is folded anew at each call, in fp32 and rounded once: the weight stays live.
    """
    gain, bias = packed.fold(scale, shift, mean, var, eps)
    folded = (weight.float() * gain.view(-1, 1, 1, 1)).to(x.dtype)
    geometry = (bias.to(x.dtype), stride, padding, dilation, groups)
    if residual is None:
        return _cudnn_relu(x, folded, *geometry)
    return _cudnn_add_relu(x, folded, residual, 1.0, *geometry)
