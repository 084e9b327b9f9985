# SPDX-License-Identifier: Apache-2.0
"""Weights in oneDNN's layout with BatchNorm folded in: packed once, kept, and never stale.

    g = scale / sqrt(var + eps)      b = shift - mean * g      packed: weight * g, and b

oneDNN adds a bias, a residual and an activation to a convolution but takes no per-channel factor,
so g is folded into the weight: in fp32, and rounded once (folding in bf16 costs half again the
error).

Packing pays only if the result is kept, and a kept copy can go stale. So each call compares what
the packed weight was made from with what the tensors hold now:
- scale, shift, mean, var: every byte, however it was written (BatchNorm's own update of its
  statistics does not raise their version counter, and `.data` writes never do);
- weight: address, shape, version counter, and four 64-byte samples, which reveal wholesale
  `.data` writes such as an exponential moving average's;
- weight, every byte by sums: at each call if other processes share it, otherwise whenever the layer
  has made another `PIXELS_PER_SUM` output pixels. Until then a write that raises no version
  (`.data`, `.numpy()`) and misses all samples goes unnoticed: `resnet_fast.refresh(model)` is for
  that.
"""

from __future__ import annotations

import ctypes
import math
import struct
import threading
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

SAMPLE_BYTES = 64
SAMPLES = 4
# Output pixels between two comparisons of a weight's sums. Reading a weight takes as long as about
# ten pixels of its convolution in fp32, a hundred in bf16 on AMX: one part in 1000, or in 100.
PIXELS_PER_SUM = 8192
MAX_SHAPES = 64  # input sizes remembered per weight; each is one dictionary entry
MAX_ALIASES = 2  # tensors over one weight's memory that each keep a copy

_DENSE = (Tensor, torch.nn.Parameter)
_INTEGERS = {2: torch.int16, 4: torch.int32}
# oneDNN's memory descriptor as C lays it out: tag, rank, sizes, type, padded sizes and offsets,
# offset, form; strides, depth, blocks and their indices; flags, mask and scale. Arrays hold 12.
_DESCRIPTION = struct.Struct("@2i12qi12q12qqi 12qi12q12q Qif")


class PackedWeight:
    """One weight in oneDNN's layout with BatchNorm folded in, and what shows whether it is stale.

    It may serve several layers (a weight beside two BatchNorms that are equal, for now), so the
    places to look at are not kept here: each caller brings the views of its own tensors.
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
        self.version = None  # stale for good, for every caller
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
    """What is kept for the weight's address: a new empty dictionary if there was nothing."""
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
                entry.version = (
                    None  # no weight has it, so holders of the copy see that it is stale
                )


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
    """What identifies a weight and its use, without looking at values."""
    kinds = [None if v is None else v.dtype for v in vectors]
    return weight.data_ptr(), weight.shape, weight.stride(), dtype, eps, kinds


def views_of(weight: Tensor, vectors) -> list[ctypes.Array]:
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
    """Sums of the weight's bits over its rows in memory: they show writes that the samples missed.

    Sums, because nothing reads memory faster: 11 GB/s on one core. Values exchanged within one row
    of at most 4 KB go unnoticed, as their sum is the same.
    """
    flat = weight.detach().as_strided((weight.numel(),), (1,))
    whole = (flat.nbytes | flat.storage_offset() * flat.element_size()) % 8 == 0
    bits = flat.view(torch.int64 if whole else _INTEGERS[flat.element_size()])
    return bits.view(-1, math.gcd(bits.numel(), 512)).sum(1)


def _layout(packed: Tensor) -> tuple | bytes:
    """oneDNN's description of a packed copy, as values: between its bytes are unwritten holes."""
    described = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())
    if len(described) < _DESCRIPTION.size:
        return described
    tag, rank, *rest = _DESCRIPTION.unpack_from(described)
    sizes, kind, padded, offsets, *rest = rest[:12], rest[12], rest[13:25], rest[25:37], *rest[37:]
    origin, form, strides, depth, *rest = *rest[:2], rest[2:14], *rest[14:]
    blocks, indices, extra = rest[:12], rest[12:24], rest[24:]
    by_rank = [values[:rank] for values in (sizes, padded, offsets, strides)]
    return by_rank, blocks[:depth], indices[:depth], tag, kind, origin, form, extra
