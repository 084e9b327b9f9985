# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels: oneDNN's fused convolution with a packed weight, ReLU, and the stem's max-pool.

    y = act(conv(x, weight * g) + b + residual)     g = scale / sqrt(var + eps)
                                                    b = shift - mean * g

The weight is folded, packed and watched in `packed.py`.

oneDNN's ReLU turns NaN into 0, torch's does not. So it is used only under a proof that no NaN can
occur: with finite weights and inputs of at most A, no value or partial sum of a convolution exceeds
gain * A + offset (gain: the largest L1 norm of a filter; offset: the largest bias), and what stays
below the dtype's largest number is finite. A caller that runs several convolutions in a row follows
that limit (`growth`) and passes the result on (`finite`); otherwise the ReLU is a pass of its own.

Source: oneDNN developer guide, "Convolution" (post-ops, attributes) and "Inference and Training
Aspects"; torch's `mkldnn` namespace, which Inductor uses too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fast.kernels.packed import PackedWeight, packed_weight, pixels_of, views_of
from resnet_fast.spec import ConvSpec

if torch.backends.mkldnn.is_available():
    _plain = torch.ops.mkldnn._convolution_pointwise.default
    _added = torch.ops.mkldnn._convolution_pointwise.binary
    _added_inplace = torch.ops.mkldnn._convolution_pointwise_.binary

# The largest bit pattern, read as a signed integer, of a negative number that is not NaN (-inf).
# Negative NaNs are above it and non-negative numbers are positive, so a threshold there is ReLU.
MINUS_INFINITY = {torch.float16: -1024, torch.bfloat16: -128}


def refusal(spec: ConvSpec) -> str | None:
    """Why oneDNN's fused convolution cannot take `spec` on this machine, or None if it can."""
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.enabled is False"
    if spec.dtype == "float64":
        return "oneDNN has no float64 convolution"
    if spec.dtype == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 instructions that oneDNN uses (AVX-512 or AMX)"
    if spec.dtype == "float16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "this CPU has no float16 instructions that oneDNN uses (AVX-512 FP16 or AMX)"
    return None


def build(spec: ConvSpec) -> Callable[..., PackedConv]:
    """Prepare `spec`: bind(weight, scale, shift, mean, var, eps) -> a `PackedConv`."""
    problem = (
        *(spec.padding, spec.stride, spec.dilation, spec.groups),
        (spec.n, spec.c, spec.h, spec.w),
    )
    dtype, relu = getattr(torch, spec.dtype), spec.activation == "relu"

    def bind(weight, scale, shift, mean, var, eps) -> PackedConv:
        vectors = (scale, shift, mean, var)
        views = views_of(weight, vectors)
        packed, entry = packed_weight(weight, vectors, views, eps, dtype, problem)
        return PackedConv(packed, entry, views, problem, relu)

    return bind


class PackedConv:
    """One convolution with its packed weight.

    Called with (x, residual, inplace, finite) it returns y, [N, P, Q, K] in memory; with `inplace`
    y is written over residual; with `finite` the caller guarantees that all values are finite.
    """

    __slots__ = (
        "added",
        "added_relu",
        "entry",
        "growth",
        "pixels",
        "plain",
        "plain_relu",
        "relu",
        "views",
    )

    def __init__(self, packed, entry: PackedWeight, views, problem, relu: bool) -> None:
        self.entry, self.views, self.growth, self.relu = entry, views, entry.growth, relu
        self.pixels, geometry = pixels_of(problem), problem[:-1]
        self.plain = (packed, entry.bias, *geometry, "none", [], "")
        self.plain_relu = (packed, entry.bias, *geometry, "relu", [], "")
        added = (packed, entry.narrow_bias, *geometry, "add", 1.0)
        self.added = (*added, None, [], None)
        self.added_relu = (*added, "relu", [], None)

    def __call__(
        self, x: Tensor, residual: Tensor | None, inplace: bool = False, finite: bool = False
    ) -> Tensor:
        fused = self.relu and finite
        if residual is None:
            y = _plain(x, *(self.plain_relu if fused else self.plain))
        else:
            arguments = self.added_relu if fused else self.added
            added = (residual, x) if inplace else (x, residual)
            y = (_added_inplace if inplace else _added)(*added, *arguments)
        return relu_(y) if self.relu and not fused else y

    def fresh(self, weight: Tensor) -> bool:
        """Whether tensors that are still where they were also still hold what was packed."""
        return self.entry.holds(weight, self.views, self.pixels)


def magnitude(x: Tensor) -> float:
    """The largest absolute value of a channels_last tensor; NaN if there is a NaN."""
    low, high = torch.aminmax(x.permute(0, 2, 3, 1))
    return max(-low.item(), high.item())


def relu_(y: Tensor) -> Tensor:
    """ReLU in place that lets NaN through, as torch's does.

    On bit patterns for the two-byte dtypes: there it is integer arithmetic at full vector width,
    where torch converts each element to fp32 and back (2 to 9 times slower, 6.4 M elements).
    """
    threshold = MINUS_INFINITY.get(y.dtype)
    if threshold is None:
        return y.relu_()
    torch.threshold_(y.view(torch.int16), threshold, 0)
    return y


def add_relu(x: Tensor, y: Tensor) -> Tensor:
    """relu(x + y), NaN passing."""
    return relu_(torch.add(x, y))


def max_pool_3x3_2(
    x: Tensor,  # [N, H, W, C]; overwritten
) -> Tensor:  # [N, ceil(H / 2), ceil(W / 2), C]
    """max_pool2d(x, 3, stride=2, padding=1) of finite, non-negative values; uses up x.

    torch's CPU max-pool also writes an int64 index beside every value, for a gradient that is not
    needed in inference: four times the bytes of a bfloat16 result. Here rows, then columns, are
    reduced by element-wise maxima of bit patterns: as integers, non-negative floats keep their
    order. The maxima of rows overwrite x: fresh memory of that size takes longer to get from the
    operating system than to fill.
    """
    bits = torch.int16 if x.element_size() == 2 else torch.int32
    image = x.permute(0, 2, 3, 1).view(bits)
    rows = _halve(image, 1, image[:, ::2])
    y = _halve(rows, 2, torch.empty_like(rows[:, :, ::2], memory_format=torch.contiguous_format))
    return y.view(x.dtype).permute(0, 3, 1, 2)


def _halve(x: Tensor, dim: int, y: Tensor) -> Tensor:
    """Fill y with maxima of x[2i - 1], x[2i], x[2i + 1] along a dimension, where these exist.

    y may be x[::2] itself.
    """
    before = (slice(None),) * dim
    even, odd = x[(*before, slice(0, None, 2))], x[(*before, slice(1, None, 2))]
    pairs, count = odd.size(dim), even.size(dim)
    torch.maximum(even.narrow(dim, 0, pairs), odd, out=y.narrow(dim, 0, pairs))
    if pairs < count:
        y.select(dim, pairs).copy_(even.select(dim, pairs))
    left = y.narrow(dim, 1, count - 1)
    torch.maximum(left, odd.narrow(dim, 0, count - 1), out=left)
    return y
