# SPDX-License-Identifier: Apache-2.0
"""The CUDA stem: the mirror of its structs, tensors to run it on, and its launch, compiled."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fast.dispatch import tiles
from resnet_fast.spec import ELEMENT_SIZE, StemSpec, StemTile, conv_output_size
from softgpu import ptx
from tests.support import nvcc
from tests.support.cases import channel_vectors
from tests.support.compiled import CompiledKernel
from tests.support.nvcc import ChannelVector, Divisor, Norm
from tests.support.tolerance import round_to_tf32

GUARD = 64  # elements around every tensor: NaN, so that a stray read shows
K_GEMM = 7 * 7 * 3
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class StemProblem(ctypes.Structure):
    """Mirror of struct StemProblem."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y", "image_mean", "image_std")),
        ("norm", Norm),
        *((name, ctypes.c_int64) for name in ("stride_n", "stride_c", "stride_h", "stride_w")),
        *((name, ctypes.c_int32) for name in ("h", "w", "k", "p", "q", "pool_p", "pool_q")),
        *((name, Divisor) for name in ("tiles_image", "tiles_row")),
        *((name, ctypes.c_int32) for name in ("tiles", "bytes")),
    )


def template(tile: StemTile, dtype: str) -> str:
    """The tile as C++ spells it."""
    numbers = (tile.BLOCK_P, tile.BLOCK_Q, tile.channels(dtype), tile.NUM_WARPS)
    return f"StemTile<{', '.join(map(str, numbers))}>"


def shared_bytes(tile: StemTile, dtype: str) -> int:
    """StemLayout<Element, Tile>::kSharedBytes, which the translation unit asserts."""
    size, channels = ELEMENT_SIZE[dtype], tile.channels(dtype)
    conv_p, conv_q = 2 * tile.BLOCK_P + 1, 2 * tile.BLOCK_Q + 1
    units = 16 * (conv_q + 3)
    plane = _banks_apart(units, 80) if size == 4 else 0
    pair = _banks_apart(2 * (plane + units), 16 * conv_q)
    filters = channels * (7 * 8 * 4 * size + 16)
    outputs = conv_p * conv_q * (channels + 8) * size
    return filters + (conv_p + 3) * pair + outputs + 8 * (channels + 4)


def _banks_apart(least: int, remainder: int) -> int:
    return least + (remainder - least) % 128


# The first tile, and the one that gives small batches more blocks.
TILES = tiles.CUDA_TILES[StemSpec]


@dataclass
class StemTensors:
    """The operands of one stem on the CPU; `out` is NaN and, as x and weight, surrounded by it.

    Args:
        x: [N, 3, H, W] of weight's dtype or uint8.
        weight: [K, 3, 7, 7] channels_last; scale, shift, mean, var: [K].
        image_mean, image_std: [3] float32, or None.
        out: [N, K, PP, PQ] channels_last.
    """

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    mean: Tensor | None
    var: Tensor | None
    image_mean: Tensor | None
    image_std: Tensor | None
    out: Tensor
    out_guard: tuple[Tensor, Tensor]
    eps: float = 1e-5

    def eager(self) -> Tensor:
        """One op after the other at weight's dtype; float32 on operands rounded to TF32."""
        dtype = self.weight.dtype
        x, weight = self.image(torch.float32).to(dtype), self.weight
        if dtype == torch.float32:
            x, weight = round_to_tf32(x), round_to_tf32(weight)
        return self._compute(x, weight, dtype)

    def reference(self) -> Tensor:
        """The same in fp64."""
        return self._compute(self.image(torch.float64), self.weight.double(), torch.float64)

    def image(self, dtype: torch.dtype) -> Tensor:
        """x as the convolution sees it."""
        if self.x.dtype != torch.uint8:
            return self.x.to(dtype)
        mean, std = torch.zeros(3), torch.ones(3)
        if self.image_mean is not None:
            mean, std = self.image_mean, self.image_std
        return (self.x.to(dtype) / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    def _compute(self, x, weight, dtype) -> Tensor:
        zeros, ones = torch.zeros_like(self.scale), torch.ones_like(self.scale)
        norm, eps = ((zeros, ones), 0.0) if self.mean is None else ((self.mean, self.var), self.eps)
        y = F.conv2d(x, weight, None, 2, 3)
        mean, var, scale, shift = (t.to(dtype) for t in (*norm, self.scale, self.shift))
        y = F.relu(F.batch_norm(y, mean, var, scale, shift, eps=eps))
        return F.max_pool2d(y, 3, 2, 1)


def stem_tensors(
    n: int,
    h: int,
    w: int,
    k: int,
    dtype: torch.dtype = torch.float16,
    *,
    layout: str = "nhwc",
    image: bool = False,
    norm: bool = True,
    params: torch.dtype = torch.float32,
    seed: int = 0,
) -> StemTensors:
    """Random operands.

    Args:
        layout: of x: "nhwc", "nchw", or "sliced": a slice of a larger "nhwc".
        image: x is uint8, with mean and std.
        params: dtype of scale, shift, mean and var.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def guarded(values, dtype=dtype):
        fill = 255 if dtype == torch.uint8 else float("nan")
        buffer = torch.full((values.numel() + 2 * GUARD,), fill, dtype=dtype)
        inner = buffer[GUARD : GUARD + values.numel()].view(values.shape)
        inner.copy_(values)
        return inner

    source = torch.uint8 if image else dtype
    shape = (n, h, w, 3) if layout == "nhwc" else (n, 3, h, w)
    if layout == "sliced":
        shape = (n, h + 2, w + 3, 3)
    values = (256 * torch.rand(shape, generator=generator)).floor() if image else normal(*shape)
    x = guarded(values, source)
    if layout == "sliced":
        x[:, 0], x[:, :, 0] = (255, 255) if image else (float("nan"), float("nan"))
        x = x[:, 1 : 1 + h, 1 : 1 + w]
    if layout != "nchw":
        x = x.permute(0, 3, 1, 2)
    weight = guarded(normal(k, 7, 7, 3) * (2 / K_GEMM) ** 0.5).permute(0, 3, 1, 2)
    vectors = channel_vectors(k, normal, norm)
    p, q = (conv_output_size(conv_output_size(size, 7, 2, 3, 1), 3, 2, 1, 1) for size in (h, w))
    out = guarded(torch.full((n, p, q, k), float("nan"))).permute(0, 3, 1, 2)
    memory = out.as_strided((out.numel() + 2 * GUARD,), (1,), 0)
    vectors = (t if t is None else t.to(params) for t in vectors)
    photograph = (torch.tensor(IMAGE_MEAN), torch.tensor(IMAGE_STD)) if image else (None, None)
    return StemTensors(x, weight, *vectors, *photograph, out, (memory[:GUARD], memory[-GUARD:]))


def stem_problem(tensors: StemTensors, tile: StemTile, address_of=None) -> StemProblem:
    """The struct that the host makes of the tensors; `address_of` gives their addresses."""
    t = tensors
    address_of = address_of or ptx.address_of
    n, _, h, w = t.x.shape
    k, p, q = t.out.shape[1:]
    tiles_row, tiles_column = -(-q // tile.BLOCK_Q), -(-p // tile.BLOCK_P)
    stride_n, stride_c, stride_h, stride_w = t.x.stride()

    def address(tensor: Tensor | None) -> int | None:
        return None if tensor is None else address_of(tensor)

    def vector(tensor: Tensor | None) -> ChannelVector:
        dtype = "float32" if tensor is None else str(tensor.dtype).removeprefix("torch.")
        return ChannelVector(address(tensor), nvcc.DTYPES[dtype])

    return StemProblem(
        *map(address, (t.x, t.weight, t.out, t.image_mean, t.image_std)),
        norm=Norm(*map(vector, (t.scale, t.shift, t.mean, t.var)), t.eps),
        stride_n=stride_n, stride_c=stride_c, stride_h=stride_h, stride_w=stride_w,
        h=h, w=w, k=k, p=(h - 1) // 2 + 1, q=(w - 1) // 2 + 1, pool_p=p, pool_q=q,
        tiles_image=Divisor.of(tiles_row * tiles_column), tiles_row=Divisor.of(tiles_row),
        tiles=n * tiles_row * tiles_column, bytes=t.x.dtype == torch.uint8,
    )  # fmt: skip


def stem_kernel(
    tensors: StemTensors, tile: StemTile, arch: int, blocks: int | None = None
) -> CompiledKernel:
    """The stem's one launch on `tensors`, with at most `blocks` blocks for a group of channels."""
    dtype = str(tensors.weight.dtype).removeprefix("torch.")
    problem, k = stem_problem(tensors, tile), tensors.out.shape[1]
    text, cubin = nvcc.compile_unit(source(tile, dtype), arch)
    grid = (min(problem.tiles, blocks or problem.tiles), -(-k // tile.channels(dtype)), 1)
    return CompiledKernel(
        name=nvcc.entry_name(text),
        arch=arch,
        ptx=text,
        cubin=cubin,
        grid=grid,
        block=(32 * tile.NUM_WARPS, 1, 1),
        shared_bytes=shared_bytes(tile, dtype),
        args=(bytes(problem),),
    )


def source(tile: StemTile, dtype: str) -> str:
    """The translation unit of one tile and dtype."""
    element = nvcc.CPP_TYPE[dtype]
    instance = f"stem_pool<{element}, {template(tile, dtype)}>(StemProblem)"
    text = nvcc.unit("cuda/device/stem_pool.cuh", instance, StemProblem)
    layout = f"resnet_fast::StemLayout<{element}, resnet_fast::{template(tile, dtype)}>"
    return f"{text}static_assert({layout}::kSharedBytes == {shared_bytes(tile, dtype)});\n"
