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
- weight: address, shape, version counter, and four 64-byte samples, which reveal wholesale
  `.data` writes such as an exponential moving average's;
- weight, every byte by sums: at each call if other processes share it, else before the layer has
  made another `PIXELS_PER_SUM` output pixels. Until then a write that raises no version (`.data`,
  `.numpy()`) and misses all samples goes unseen: `resnet_fast.refresh(model)` is for that.

oneDNN's ReLU turns NaN into 0, torch's does not. So it is used only under a proof that no NaN can
be: with finite weights and inputs of at most A, no value or partial sum of a convolution exceeds
gain * A + offset (gain: the largest L1 norm of a filter; offset: the largest bias), and what stays
below the dtype's largest number is finite. Whoever calls several convolutions in a row follows that
bound (`growth`) and says so (`finite`); otherwise the ReLU is a pass of its own over the result.

Source: oneDNN developer guide, "Convolution" (post-ops, attributes) and "Inference and Training
Aspects"; torch's `mkldnn` namespace, which Inductor uses too.
"""

from __future__ import annotations

import ctypes
import math
import struct
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fast.spec import ConvSpec

SAMPLE_BYTES = 64
SAMPLES = 4
# Output pixels between two comparisons of a weight's sums. Reading a weight takes as long as some
# ten pixels of its convolution do in fp32, a hundred in bf16 on AMX: a thousandth, a hundredth.
PIXELS_PER_SUM = 8192
MAX_SHAPES = 64  # input sizes remembered per weight; each is one dictionary entry
MAX_ALIASES = 2  # tensors over one weight's memory that each keep a copy

_DENSE = (Tensor, torch.nn.Parameter)
_INTEGERS = {2: torch.int16, 4: torch.int32}
# oneDNN's memory descriptor as C lays it out: tag, rank, sizes, type, padded sizes and offsets,
# offset, form; strides, depth, blocks and their indices; flags, mask and scale. Arrays hold 12.
_DESCRIPTION = struct.Struct("@2i12qi12q12qqi 12qi12q12q Qif")

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


def build(spec: ConvSpec) -> Callable[..., BoundConv]:
    """Prepare `spec`: bind(weight, scale, shift, mean, var, eps) -> a `BoundConv`."""
    problem = (
        *(spec.padding, spec.stride, spec.dilation, spec.groups),
        (spec.n, spec.c, spec.h, spec.w),
    )
    dtype, relu = getattr(torch, spec.dtype), spec.activation == "relu"

    def bind(weight, scale, shift, mean, var, eps) -> BoundConv:
        vectors = (scale, shift, mean, var)
        views = _views(weight, vectors)
        packed, entry = packed_weight(weight, vectors, views, eps, dtype, problem)
        return BoundConv(packed, entry, views, problem, relu)

    return bind


class BoundConv:
    """One convolution with its packed weight.

    Called with (x, residual, inplace, finite) it returns y, [N, P, Q, K] in memory; with `inplace`
    y is written over residual; with `finite` the caller vouches that all values are.
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
    x: Tensor,  # [N, H, W, C]
) -> Tensor:  # [N, ceil(H / 2), ceil(W / 2), C]
    """max_pool2d(x, 3, stride=2, padding=1) of finite, non-negative values.

    torch's CPU max-pool writes an int64 index beside every value, for a gradient that inference
    does not want: four times the bytes of a bfloat16 result. Here rows, then columns, are reduced
    by element-wise maxima of bit patterns: as integers, non-negative floats keep their order.
    """
    bits = torch.int16 if x.element_size() == 2 else torch.int32
    rows = _halve(x.permute(0, 2, 3, 1).view(bits), 1)
    return _halve(rows, 2).view(x.dtype).permute(0, 3, 1, 2)


def _halve(x: Tensor, dim: int) -> Tensor:
    """Maxima of x[2i - 1], x[2i], x[2i + 1] along a dimension, for those of them that exist."""
    before = (slice(None),) * dim
    even, odd = x[(*before, slice(0, None, 2))], x[(*before, slice(1, None, 2))]
    if even.size(dim) == odd.size(dim):
        y = torch.maximum(even, odd)
    else:
        y = even.clone(memory_format=torch.contiguous_format)
        right = y.narrow(dim, 0, odd.size(dim))
        torch.maximum(right, odd, out=right)
    left = y.narrow(dim, 1, y.size(dim) - 1)
    torch.maximum(left, odd.narrow(dim, 0, left.size(dim)), out=left)
    return y


class PackedWeight:
    """One weight in oneDNN's layout with BatchNorm folded in, and all that tells if it is stale.

    It may serve several layers (a weight beside two BatchNorms that are equal, for now), so where
    to look is not kept here: each caller brings the views of its own tensors.
    """

    __slots__ = (
        "before",
        "bias",
        "growth",
        "narrow_bias",
        "origin",
        "packed",
        "served",
        "shared",
        "sums",
        "version",
    )

    def __init__(self, weight, vectors, views, eps, dtype) -> None:
        self.origin = _origin(weight, vectors, eps, dtype)
        self.version = weight._version
        self.before = [view.raw for view in views]
        self.sums = _sums(weight)
        self.served = 0  # output pixels since the sums were compared
        self.shared = weight.is_shared()  # with other processes, whose writes raise no version
        self.bias = fold(*vectors, eps)[1]
        self.narrow_bias = self.bias.to(dtype)  # with a residual, oneDNN's binding takes no other
        self.packed: dict[tuple, Tensor] = {}  # by problem: the layout may depend on x's size
        self.growth = (math.nan, math.nan)  # (gain, offset), known once packed

    def matches(self, weight, vectors, views, eps, dtype, pixels: int) -> bool:
        """Whether the tensors hold what this was packed from; the vectors may have moved."""
        same = _origin(weight, vectors, eps, dtype) == self.origin
        return same and self.holds(weight, views, pixels)

    def holds(self, weight: Tensor, views: list[ctypes.Array], pixels: int) -> bool:
        """`matches` for tensors that are known to be where they were.

        Args:
            pixels: N * P * Q of the output that the answer is for.
        """
        if weight._version != self.version or [view.raw for view in views] != self.before:
            return False
        self.served += pixels
        if self.served < PIXELS_PER_SUM and not self.shared:
            return True
        self.served = 0
        if torch.equal(_sums(weight), self.sums):
            return True
        self.version = None  # stale for good, whoever asks next
        return False

    def pack(self, weight, vectors, eps, problem) -> Tensor:
        """The folded weight in the layout that oneDNN prefers for `problem`."""
        gain, _ = fold(*vectors, eps)
        folded = (weight.detach().float() * gain.view(-1, 1, 1, 1)).to(self.narrow_bias.dtype)
        folded = folded.contiguous(memory_format=torch.channels_last)
        gain = torch.linalg.vector_norm(folded, 1, (1, 2, 3), dtype=torch.float32).max().item()
        self.growth = (gain, self.bias.abs().max().item())
        packed = torch.ops.mkldnn._reorder_convolution_weight(folded, *problem[:-1], problem[-1])
        # Most sizes share a layout, and then they share the copy.
        layout = _layout(packed)
        same = (other for other in self.packed.values() if _layout(other) == layout)
        packed = next(same, packed)
        if len(self.packed) >= MAX_SHAPES:
            self.packed.clear()
        self.packed[problem] = packed
        return packed


class _Kept(NamedTuple):
    """What is kept for the weights at one address, for as long as the storage there lives."""

    # Not of the tensor: torch.utils.swap_tensors refuses one that has a weak reference.
    storage: weakref.ref
    entries: dict[int, PackedWeight]  # by tensor: aliases count their versions apart


_cache: dict[int, _Kept] = {}
_packing = threading.RLock()  # reading needs no lock: entries are replaced whole


def packed_weight(weight, vectors, views, eps, dtype, problem) -> tuple[Tensor, PackedWeight]:
    """The packed weight for these tensors and its entry, made anew if any of them changed."""
    with _packing:
        entries = _entries(weight)
        entry = entries.get(weight._cdata)
        asked = (weight, vectors, views, eps, dtype)
        if entry is None or not entry.matches(*asked, pixels_of(problem)):
            while len(entries) >= MAX_ALIASES:
                del entries[next(iter(entries))]
            entry = entries[weight._cdata] = PackedWeight(*asked)
        packed = entry.packed.get(problem)
        if packed is None:
            packed = entry.pack(weight, vectors, eps, problem)
        return packed, entry


def _entries(weight: Tensor) -> dict[int, PackedWeight]:
    """What is kept for the weight's address; an empty dictionary that will be if there is none."""
    address, storage = weight.data_ptr(), weight.untyped_storage()
    kept = _cache.get(address)
    if kept is None or kept.storage() is not storage:

        def drop(gone: weakref.ref) -> None:
            if address in _cache and _cache[address].storage is gone:
                del _cache[address]

        kept = _cache[address] = _Kept(weakref.ref(storage, drop), {})
    return kept.entries


def forget(weights: Iterable[Tensor] | None = None) -> None:
    """Drop the packed copies of `weights`, or of all weights: the next call packs again."""
    with _packing:
        keys = list(_cache) if weights is None else _addresses(weights)
        for kept in filter(None, [_cache.pop(key, None) for key in keys]):
            for entry in kept.entries.values():
                entry.version = None  # no weight's: whoever holds the copy sees that it is stale


def packed_bytes(weights: Iterable[Tensor]) -> int:
    """Bytes that the packed copies of `weights` take."""
    with _packing:
        kept = [_cache[key] for key in _addresses(weights) if key in _cache]
        entries = [entry for one in kept for entry in one.entries.values()]
        packed = {id(p): p for entry in entries for p in entry.packed.values()}
    return sum(torch.ops.mkldnn._nbytes(p) for p in packed.values())


def _addresses(weights: Iterable[Tensor]) -> set[int]:
    return {w.data_ptr() for w in weights if type(w) in _DENSE and w.device.type == "cpu"}


def fold(scale, shift, mean, var, eps) -> tuple[Tensor, Tensor]:
    """BatchNorm as one factor and one bias per channel, both fp32."""
    gain, bias = scale.detach().float(), shift.detach().float()
    if mean is not None:
        gain = gain * torch.rsqrt(var.detach().float() + eps)
        bias = bias - mean.detach().float() * gain
    return gain, bias.clone() if mean is None else bias


def pixels_of(problem: tuple) -> int:
    """N * H * W of the input over the strides: the output's pixels, padding aside."""
    _, (stride_h, stride_w), _, _, (n, _, h, w) = problem
    return n * -(-h // stride_h) * -(-w // stride_w)


def _origin(weight, vectors, eps, dtype) -> tuple:
    """What tells one weight and its use from another, without looking at values."""
    kinds = [None if v is None else v.dtype for v in vectors]
    return weight.data_ptr(), weight.shape, weight.stride(), dtype, eps, kinds


def _views(weight: Tensor, vectors) -> list[ctypes.Array]:
    """The memory that is compared: spots of the dense weight, ends included, and vectors."""
    for tensor in (weight, *vectors):
        if tensor is not None:
            _check_allocated(tensor)
    count = min(SAMPLE_BYTES, weight.nbytes)
    last = weight.nbytes - count
    spots = sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)})
    places = [(weight.data_ptr() + spot, count) for spot in spots]
    places += [(v.data_ptr(), v.nbytes) for v in vectors if v is not None]
    return [(ctypes.c_char * size).from_address(address) for address, size in places]


def _check_allocated(tensor: Tensor) -> None:
    """Raise RuntimeError if the storage was freed or shrunk under a dense tensor."""
    there = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
    if there < tensor.nbytes:
        raise RuntimeError(
            f"resnet_fast: a tensor of shape {list(tensor.shape)} needs {tensor.nbytes} bytes, its "
            f"storage has {max(there, 0)}; was it resized? Load the weights again"
        )


def _sums(weight: Tensor) -> Tensor:
    """Sums of the weight's bits over its rows in memory: what a write that no sample saw changes.

    Sums, because memory is read no faster by anything: 11 GB/s on one core. Exchanged values within
    one row of at most 4 KB go unseen; their sum is the same.
    """
    flat = weight.detach().as_strided((weight.numel(),), (1,))
    whole = (flat.nbytes | flat.storage_offset() * flat.element_size()) % 8 == 0
    bits = flat.view(torch.int64 if whole else _INTEGERS[flat.element_size()])
    return bits.view(-1, math.gcd(bits.numel(), 512)).sum(1)


def _layout(packed: Tensor) -> tuple | bytes:
    """oneDNN's description of a packed copy, as values: its bytes have holes that nobody writes."""
    described = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())
    if len(described) < _DESCRIPTION.size:
        return described
    tag, rank, *rest = _DESCRIPTION.unpack_from(described)
    sizes, kind, padded, offsets, *rest = rest[:12], rest[12], rest[13:25], rest[25:37], *rest[37:]
    origin, form, strides, depth, *rest = *rest[:2], rest[2:14], *rest[14:]
    blocks, indices, extra = rest[:12], rest[12:24], rest[24:]
    by_rank = [values[:rank] for values in (sizes, padded, offsets, strides)]
    return by_rank, blocks[:depth], indices[:depth], tag, kind, origin, form, extra
