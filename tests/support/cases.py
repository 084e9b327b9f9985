# SPDX-License-Identifier: Apache-2.0
"""The convolutions that tests and benchmarks run, and the tensors to run them on.

Lists are curated and every case has an id: the distinct convolutions of real networks, at a reduced
size if a slow interpreter runs them, and unusual ones that each break an assumption.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from resnet_fast import _hardware
from resnet_fast.dispatch import heuristics, tiles
from resnet_fast.spec import ConvSpec, TileConfig
from tests.support.tolerance import round_to_tf32

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# (dtype, precision) of a convolution
KINDS = (("float16", "tf32"), ("bfloat16", "tf32"), ("float32", "tf32"), ("float32", "ieee"))
GUARD = 64  # elements around every tensor: NaN, so that a stray read shows


BLOCKS = {  # of each stage
    18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)
}  # fmt: skip


def resnet_convs(depth: int, n: int = 1, size: int = 224, **options) -> dict[str, ConvSpec]:
    """The distinct convolutions of torchvision's ResNet of `depth` 18, 34, 50, 101 or 152.

    Args:
        n, size: batch, and height and width of the images.
        options: further fields of `ConvSpec`, such as dtype and precision.

    Returns:
        the specs by a readable id, such as "layer2-conv2-3x3/2"; each with the residual and the
        activation it has in the network.
    """
    convs: dict[str, ConvSpec] = {}
    for name, spec, _ in resnet_layers(depth, n, size, **options):
        if spec not in convs.values():
            convs[name] = spec
    return convs


def resnet_layers(
    depth: int, n: int = 1, size: int = 224, **options
) -> list[tuple[str, ConvSpec, int]]:
    """(id, convolution, how often it runs) of the stem and each stage's first and next blocks."""
    bottleneck = depth >= 50
    layers: list[tuple[str, ConvSpec, int]] = []
    repeats = 1

    def add(name, size, c, k, r, stride, **extra) -> int:
        spec = ConvSpec(
            n, size, size, c, k, r, r, (stride, stride), (r // 2, r // 2), norm=True,
            **{**options, **extra},
        )  # fmt: skip
        layers.append((f"{name}-{r}x{r}/{stride}", spec, repeats))
        return spec.p

    size = (add("stem", size, 3, 64, 7, 2) + 1) // 2  # the max-pool halves once more
    c = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for block, stride in enumerate((1 if stage == 1 else 2, 1)):
            name = f"layer{stage}-{'first' if block == 0 else 'next'}"
            repeats = 1 if block == 0 else BLOCKS[depth][stage - 1] - 1
            out = width * 4 if bottleneck else width
            if block == 0 and (stride != 1 or c != out):
                add(f"{name}-downsample", size, c, out, 1, stride, activation="none")
            if bottleneck:
                add(f"{name}-conv1", size, c, width, 1, 1)
                size = add(f"{name}-conv2", size, width, width, 3, stride)
                add(f"{name}-conv3", size, width, out, 1, 1, residual=True)
            else:
                size = add(f"{name}-conv1", size, c, width, 3, stride)
                add(f"{name}-conv2", size, width, width, 3, 1, residual=True)
            c = out
    return layers


ODD = {
    "height-is-not-width": ConvSpec(2, 11, 6, 64, 64, 3, 3, (1, 1), (1, 1), norm=True),
    "three-channels": ConvSpec(2, 9, 8, 3, 16, 3, 3, (1, 1), (1, 1), norm=True),
    "three-channels-7x7": ConvSpec(1, 18, 21, 3, 64, 7, 7, (2, 2), (3, 3), residual=True),
    "four-channels": ConvSpec(1, 9, 9, 4, 32, 3, 3, (1, 1), (1, 1)),
    "one-channel": ConvSpec(1, 9, 9, 1, 16, 3, 3, (1, 1), (1, 1)),
    "k-24": ConvSpec(2, 7, 7, 64, 24, 3, 3, (1, 1), (1, 1), residual=True, norm=True),
    "k-1": ConvSpec(1, 5, 5, 16, 1, 1, 1),
    "c-24": ConvSpec(2, 7, 7, 24, 40, 3, 3, (1, 1), (1, 1), residual=True),
    "c-20": ConvSpec(1, 7, 7, 20, 32, 3, 3, (1, 1), (1, 1), norm=True),
    "c-100-pointwise": ConvSpec(1, 6, 6, 100, 36, 1, 1, norm=True),
    "c-72-uneven-steps": ConvSpec(1, 8, 8, 72, 64, 3, 3, (2, 2), (1, 1)),
    "map-1x1": ConvSpec(3, 1, 1, 128, 64, 1, 1, residual=True),
    "map-1x1-padded": ConvSpec(3, 1, 1, 64, 64, 3, 3, (1, 1), (1, 1)),
    "stride-3": ConvSpec(2, 13, 11, 32, 32, 3, 3, (3, 3), (1, 1)),
    "stride-of-axes": ConvSpec(1, 12, 12, 32, 32, 3, 3, (1, 2), (0, 1)),
    "stride-3-pointwise": ConvSpec(2, 10, 7, 64, 64, 1, 1, (3, 3)),
    "dilation-2": ConvSpec(1, 12, 12, 64, 64, 3, 3, (1, 1), (2, 2), (2, 2), norm=True),
    "dilation-of-three-channels": ConvSpec(1, 12, 12, 3, 16, 3, 3, (1, 1), (2, 2), (2, 2)),
    "padding-beyond-filter": ConvSpec(1, 5, 5, 16, 16, 3, 3, (1, 1), (4, 4)),
    "padded-pointwise": ConvSpec(1, 6, 6, 32, 32, 1, 1, (1, 1), (1, 1)),
    "filter-of-axes": ConvSpec(1, 9, 10, 16, 16, 1, 5, (1, 1), (0, 2)),
    "batch-prime": ConvSpec(13, 3, 3, 32, 32, 3, 3, (1, 1), (1, 1), residual=True, norm=True),
    "no-activation": ConvSpec(1, 6, 6, 32, 32, 3, 3, (1, 1), (1, 1), activation="none"),
}


TRITON, TILES = tiles.TRITON[ConvSpec], tiles.TRITON_TILES[ConvSpec]

# The most demanding forms: taps with a mask, steps that are not full, norm, residual, activation.
DEMANDING = (
    ConvSpec(8, 28, 28, 264, 256, 3, 3, (1, 1), (1, 1), residual=True, norm=True),
    ConvSpec(8, 28, 28, 40, 256, 3, 3, (1, 1), (1, 1), residual=True, norm=True),
    ConvSpec(8, 28, 28, 24, 16, 3, 3, (1, 1), (1, 1), residual=True, norm=True),
)


def is_meant_for(spec: ConvSpec, tile: TileConfig, arch: int) -> bool:
    """Whether the heuristics of `arch` may choose `tile` for `spec`."""
    return TRITON.refusal(spec, tile, _hardware.GPUS[arch]) is None


def demanding(tile: TileConfig, arch: int) -> ConvSpec:
    """The most demanding convolution that `tile` is meant for; the last kinds need the most."""
    specs = (replace(s, dtype=d, precision=p) for d, p in reversed(KINDS) for s in DEMANDING)
    return next(spec for spec in specs if is_meant_for(spec, tile, arch))


def cut(tile: TileConfig, arch: int) -> ConvSpec:
    """`demanding`, so small that one tile is whole and the others are cut in rows and columns."""
    spec = demanding(tile, arch)
    height = tile.BLOCK_M // 10 + 1
    return replace(spec, n=1, h=height, w=10, c=min(spec.c, 72), k=tile.BLOCK_N + 16)


def whole(tile: TileConfig, arch: int, dtype: str, precision: str) -> ConvSpec | None:
    """A 3x3 convolution that `tile` cuts into 2x2 whole tiles; None if it is not meant for one.

    It has padding, norm, residual and activation; every step is full, and there are enough to fill
    the pipeline twice.
    """
    for c in (2 * tile.BLOCK_K, tile.BLOCK_K):
        spec = ConvSpec(
            1, tile.BLOCK_M // 8, 16, c, 2 * tile.BLOCK_N, 3, 3, (1, 1), (1, 1),
            dtype=dtype, precision=precision, residual=True, norm=True,
        )  # fmt: skip
        if is_meant_for(spec, tile, arch):
            return spec
    return None


def tile_cases(arch: int, dtype: str, precision: str) -> list[tuple[ConvSpec, TileConfig]]:
    """Every tile of the table of `arch` that is meant for one kind of arithmetic.

    Each with a 3x3 convolution; at the first kind that it is meant for also with a pointwise one,
    with the products split, and with tiles that are cut. And the 7x7 stem, at its own tile.
    """
    found = []
    for tile in TILES[arch]:
        kinds = [kind for kind in KINDS if whole(tile, arch, *kind)]
        if (dtype, precision) not in kinds:
            continue
        spec = whole(tile, arch, dtype, precision)
        found.append((spec, tile))
        if (dtype, precision) == kinds[0]:
            pointwise = replace(spec, r=1, s=1, padding=(0, 0))
            longer = replace(pointwise, c=2 * spec.c)
            found.append((longer if is_meant_for(longer, tile, arch) else pointwise, tile))
            found.append((spec, replace(tile, SPLIT_K=2)))
        if (limit := cut(tile, arch)) and (limit.dtype, limit.precision) == (dtype, precision):
            found.append((limit, tile))
    stem = ConvSpec(
        1, 32, 32, 3, 64, 7, 7, (2, 2), (3, 3), dtype=dtype, precision=precision, norm=True
    )
    return [*found, (stem, replace(heuristics.choose(stem, arch, TRITON), SPLIT_K=1))]


@dataclass
class ConvTensors:
    """The operands of one fused convolution, in torch's shapes with NHWC memory.

    Args:
        x: [N, C, H, W], a slice of something larger whose other elements are NaN.
        weight: [K, C, R, S]; scale, shift, mean, var: [K]; residual, out: [N, K, P, Q].
        out_guard: what surrounds `out` in memory: NaN, before and after.
    """

    spec: ConvSpec
    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    mean: torch.Tensor | None
    var: torch.Tensor | None
    residual: torch.Tensor | None
    out: torch.Tensor
    out_guard: tuple[torch.Tensor, torch.Tensor]
    eps: float = 1e-5

    def eager(self) -> torch.Tensor:
        """What eager torch computes at this dtype, one op after another; in TF32 where asked."""
        x, weight = self.x, self.weight
        if self.spec.dtype == "float32" and self.spec.precision == "tf32":
            x, weight = round_to_tf32(x), round_to_tf32(weight)
        return self._compute(x, weight, self.residual, x.dtype)

    def reference(self) -> torch.Tensor:
        """The same in fp64."""
        double = [t if t is None else t.double() for t in (self.x, self.weight, self.residual)]
        return self._compute(*double, torch.float64)

    def _compute(self, x, weight, residual, dtype) -> torch.Tensor:
        spec = self.spec
        zeros, ones = torch.zeros_like(self.scale), torch.ones_like(self.scale)
        norm, eps = ((zeros, ones), 0.0) if self.mean is None else ((self.mean, self.var), self.eps)
        y = F.conv2d(x, weight, None, spec.stride, spec.padding, spec.dilation, spec.groups)
        mean, var, scale, shift = (t.to(dtype) for t in (*norm, self.scale, self.shift))
        y = F.batch_norm(y, mean, var, scale, shift, eps=eps)
        if residual is not None:
            y = y + residual
        return F.relu(y) if spec.activation == "relu" else y


def conv_tensors(
    spec: ConvSpec,
    *,
    seed: int = 0,
    params: torch.dtype = torch.float32,
    sliced: bool = False,
    misaligned: bool = False,
) -> ConvTensors:
    """Random operands of `spec` on the CPU, each surrounded by NaN; `out` is NaN itself.

    Args:
        params: dtype of scale, shift, mean and var.
        sliced: x is a slice of a larger [N, H, W, C] along all of H, W and C.
        misaligned: x, weight and residual start at addresses that are not multiples of 16 bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, spec.dtype)
    start = GUARD + (1 if misaligned else 0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def guarded(values):  # [A, B, C, D] in memory order
        buffer = torch.full((values.numel() + 2 * start,), float("nan"), dtype=dtype)
        inner = buffer[start : start + values.numel()].view(values.shape)
        inner.copy_(values)
        return inner.permute(0, 3, 1, 2)

    if sliced:
        shape = (spec.n, spec.h + 2, spec.w + 3, spec.c + 16)
        larger = torch.full(shape, float("nan"), dtype=dtype)
        x = larger[:, 1 : 1 + spec.h, 2 : 2 + spec.w, 8 : 8 + spec.c].permute(0, 3, 1, 2)
        x.copy_(normal(*x.shape))
    else:
        x = guarded(normal(spec.n, spec.h, spec.w, spec.c))
    gain = (2 / spec.k_gemm) ** 0.5
    weight = guarded(normal(spec.k, spec.r, spec.s, spec.c) * gain)
    residual = guarded(normal(spec.n, spec.p, spec.q, spec.k)) if spec.residual else None
    vectors = channel_vectors(spec.k, normal, spec.norm)
    out = guarded(torch.full((spec.n, spec.p, spec.q, spec.k), float("nan")))
    memory = out.as_strided((out.numel() + 2 * start,), (1,), 0)
    vectors = (t if t is None else t.to(params) for t in vectors)
    return ConvTensors(spec, x, weight, *vectors, residual, out, (memory[:start], memory[-start:]))


def channel_vectors(k: int, normal: Callable[[int], torch.Tensor], norm: bool) -> tuple:
    """(scale, shift, mean, var), each [K] of fp32; without `norm` the last two are None.

    A third of the scales are negative. A quarter of the variances are zero or about as small as
    eps, so that a wrong or missing eps shows; the scales there are as small, so that all channels
    have the same weight. All are powers of two, which no dtype rounds.
    """
    scale, shift = normal(k).abs() + 0.5, normal(k)
    scale[1::3] *= -1
    if not norm:
        return scale, shift, None, None
    mean, var = normal(k), normal(k).abs() + 0.5
    tiny = torch.arange(k)[2::4]
    var[tiny] = torch.tensor([0.0, 2.0**-20, 2.0**-17, 2.0**-14])[tiny // 4 % 4]
    scale[tiny] *= (var[tiny] + 1e-5).sqrt()
    return scale, shift, mean, var


def with_dtype(specs: dict[str, ConvSpec], dtype: str, precision: str = "tf32") -> dict:
    """The same cases at another dtype."""
    return {name: replace(s, dtype=dtype, precision=precision) for name, s in specs.items()}
