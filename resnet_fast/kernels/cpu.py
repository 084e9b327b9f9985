# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels: oneDNN's fused convolution, its weights packed once and never stale.

    y = act(conv(x, weight * g) + b + residual)     g = scale / sqrt(var + eps)
                                                    b = shift - mean * g

oneDNN adds a bias, a residual and an activation to a convolution but no per-channel factor, so g is
folded into the weight: in fp32, and rounded once (folding in bf16 costs half again the error).

Packing pays only if it is kept, and what is kept can go stale. Each call therefore compares what
the packed weight was made from with what the tensors hold now:
- scale, shift, mean, var: every byte, whoever wrote it and however (BatchNorm's own update of
  its statistics does not raise their version counter, `.data` writes raise none at all);
- weight: identity of its storage, version counter, dtype, and four 64-byte samples, which reveal
  wholesale `.data` writes such as an exponential moving average's. Only a `.data` write that
  misses all four samples goes unseen: `resnet_fast.refresh(model)` is for that.

oneDNN's ReLU turns NaN into 0, torch's does not. So the activation is applied here as torch's:
as a leaky ReLU inside the convolution where the caller allows a slope (see `negative_slope`), else
by one pass over the result while it is still in cache.

Source: oneDNN developer guide, "Convolution" (post-ops, attributes) and "Inference and Training
Aspects"; torch's `mkldnn` namespace, which Inductor uses too.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fast.spec import ConvSpec

SAMPLE_BYTES = 64
SAMPLES = 4
MAX_SHAPES = 64  # input sizes remembered per weight; each is one dictionary entry

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


def build(spec: ConvSpec) -> Callable[..., Tensor]:
    """The function that runs `spec`: (x, weight, scale, shift, residual, mean, var, eps, inplace).

    It returns y, [N, P, Q, K] in memory; with `inplace` y is written over residual.
    """
    geometry = (spec.padding, spec.stride, spec.dilation, spec.groups)
    problem = (*geometry, (spec.n, spec.c, spec.h, spec.w))
    plain = torch.ops.mkldnn._convolution_pointwise.default
    binary = torch.ops.mkldnn._convolution_pointwise.binary
    binary_inplace = torch.ops.mkldnn._convolution_pointwise_.binary
    slope = spec.negative_slope
    relu = spec.activation == "relu"
    attribute = ("leaky_relu", [slope], "") if relu and slope else ("none", [], "")

    def run(x, weight, scale, shift, residual, mean, var, eps, inplace=False) -> Tensor:
        packed, entry = packed_weight(weight, scale, shift, mean, var, eps, x.dtype, problem)
        if residual is None:
            y = plain(x, packed, entry.bias, *geometry, *attribute)
            return relu_(y) if relu and not slope else y
        bias = entry.narrow_bias
        if inplace:
            y = binary_inplace(residual, x, packed, bias, *geometry, "add", 1.0, None, [], None)
        else:
            y = binary(x, residual, packed, bias, *geometry, "add", 1.0, None, [], None)
        return relu_(y) if relu else y

    return run


def relu_(y: Tensor) -> Tensor:
    """ReLU in place that lets NaN through, as torch's does.

    On bit patterns for the two-byte dtypes: there it is integer arithmetic at full vector width,
    where torch converts each element to fp32 and back (3 to 9 times slower, 6.4 M elements).
    """
    threshold = MINUS_INFINITY.get(y.dtype)
    if threshold is None:
        return y.relu_()
    torch.threshold_(y.view(torch.int16), threshold, 0)
    return y


def add_relu(x: Tensor, y: Tensor) -> Tensor:
    """relu(x + y), NaN passing."""
    return relu_(torch.add(x, y))


class PackedWeight:
    """One weight in oneDNN's layout with BatchNorm folded in, and all that tells if it is stale."""

    __slots__ = (
        "bias",
        "dtype",
        "eps",
        "narrow_bias",
        "packed",
        "pointer",
        "samples",
        "vectors",
        "version",
    )

    def __init__(self, weight, scale, shift, mean, var, eps, dtype) -> None:
        self.pointer, self.version = weight.data_ptr(), weight._version
        self.dtype, self.eps = dtype, eps
        self.samples = [(view, view.raw) for view in _samples(weight)]
        self.vectors = tuple(_Vector(v) for v in (scale, shift, mean, var))
        self.bias = fold(scale, shift, mean, var, eps)[1]
        self.narrow_bias = self.bias.to(dtype)  # with a residual, oneDNN's binding takes no other
        self.packed: dict[tuple, Tensor] = {}  # by problem: the layout may depend on x's size

    def matches(self, weight, scale, shift, mean, var, eps, dtype) -> bool:
        """Whether the tensors still hold what this was packed from."""
        if (
            weight.data_ptr() != self.pointer
            or weight._version != self.version
            or dtype != self.dtype
            or eps != self.eps
        ):
            return False
        for view, before in self.samples:
            if view.raw != before:
                return False
        a, b, c, d = self.vectors
        return a.matches(scale) and b.matches(shift) and c.matches(mean) and d.matches(var)

    def pack(self, weight, scale, shift, mean, var, eps, problem) -> Tensor:
        """The folded weight in the layout that oneDNN prefers for `problem`."""
        gain, _ = fold(scale, shift, mean, var, eps)
        folded = (weight.detach().float() * gain.view(-1, 1, 1, 1)).to(self.dtype)
        folded = folded.contiguous(memory_format=torch.channels_last)
        packed = torch.ops.mkldnn._reorder_convolution_weight(folded, *problem[:-1], problem[-1])
        if len(self.packed) >= MAX_SHAPES:
            self.packed.clear()
        # Most sizes share a layout, and then they share the copy.
        layout = _layout(packed)
        same = (other for other in self.packed.values() if _layout(other) == layout)
        packed = self.packed[problem] = next(same, packed)
        return packed


class _Vector:
    """The bytes that a [K] vector held when a weight was packed, compared without a copy of it."""

    __slots__ = ("before", "dtype", "pointer", "view")

    def __init__(self, vector: Tensor | None) -> None:
        if vector is None:
            self.pointer, self.before = 0, b""
            return
        self.dtype, self.pointer = vector.dtype, vector.data_ptr()
        self.view = (ctypes.c_char * vector.nbytes).from_address(self.pointer)
        self.before = self.view.raw

    def matches(self, vector: Tensor | None) -> bool:
        if vector is None:
            return self.pointer == 0
        pointer = vector.data_ptr()
        if pointer == self.pointer:
            return self.view.raw == self.before and vector.dtype == self.dtype
        if self.pointer == 0 or vector.dtype != self.dtype or vector.nbytes != len(self.before):
            return False
        # The same values at another address, as when a caller computes them anew for each call.
        if ctypes.string_at(pointer, vector.nbytes) != self.before:
            return False
        self.__init__(vector)
        return True


_cache: dict[int, tuple[weakref.ref, PackedWeight]] = {}


def packed_weight(
    weight, scale, shift, mean, var, eps, dtype, problem
) -> tuple[Tensor, PackedWeight]:
    """The packed weight for these tensors and its entry, made anew if any of them changed."""
    key = id(weight)
    found = _cache.get(key)
    if found is None or not found[1].matches(weight, scale, shift, mean, var, eps, dtype):
        entry = PackedWeight(weight, scale, shift, mean, var, eps, dtype)
        found = _cache[key] = (weakref.ref(weight, lambda _: _cache.pop(key, None)), entry)
    entry = found[1]
    packed = entry.packed.get(problem)
    if packed is None:
        packed = entry.pack(weight, scale, shift, mean, var, eps, problem)
    return packed, entry


def forget(weights=None) -> None:
    """Drop the packed copies of `weights`, or of all weights: the next call packs again."""
    if weights is None:
        _cache.clear()
        return
    for weight in weights:
        _cache.pop(id(weight), None)


def packed_bytes(weights) -> int:
    """Bytes that the packed copies of `weights` take."""
    total = 0
    for weight in weights:
        found = _cache.get(id(weight))
        if found is not None:
            packed = {id(p): p for p in found[1].packed.values()}
            total += sum(torch.ops.mkldnn._nbytes(p) for p in packed.values())
    return total


def fold(scale, shift, mean, var, eps) -> tuple[Tensor, Tensor]:
    """BatchNorm as one factor and one bias per channel, both fp32."""
    gain, bias = scale.detach().float(), shift.detach().float()
    if mean is not None:
        gain = gain * torch.rsqrt(var.detach().float() + eps)
        bias = bias - mean.detach().float() * gain
    return gain, bias.clone() if mean is None else bias


def _samples(weight: Tensor) -> list[ctypes.Array]:
    """Views of `SAMPLES` spots spread over a dense weight's memory, its two ends included."""
    count = min(SAMPLE_BYTES, weight.nbytes)
    last = weight.nbytes - count
    spots = sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)})
    return [(ctypes.c_char * count).from_address(weight.data_ptr() + spot) for spot in spots]


def _layout(packed: Tensor) -> bytes:
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())
