# SPDX-License-Identifier: Apache-2.0
"""The backends of `stem_pool`: convolution, norm, ReLU and max-pool of a ResNet's stem.

    name    device     what it runs                                           x
    cuda    cuda       csrc/cuda/device/stem_pool.cuh: one kernel             any layout, bytes
    triton  cuda       kernels/conv_bn_act.py, then kernels/stem_pool.py      channels_last
    cpu     cpu        kernels/cpu.py: its convolution, then its pool         channels_last
    aten    any        torch's own functions; refuses nothing                 any layout

Where x is bytes, all but the first normalize it in a pass of torch's own, into channels_last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast import _env, _hardware
from resnet_fast.dispatch import backends, cuda
from resnet_fast.dispatch.problem import on_device_of
from resnet_fast.dispatch.trial import on_trial
from resnet_fast.kernels import aten, cpu
from resnet_fast.spec import ConvSpec, TileConfig, conv_output_size

CUDA_DTYPES = ("float16", "bfloat16", "float32")
CUDA_CHANNELS = 8  # K is a multiple of it: whole 16 bytes of half precision
CUDA_TILES_LIMIT = 2**31


@dataclass(frozen=True, slots=True)
class StemTile:
    """How the CUDA kernel cuts the work: a block's pixels of y, and its warps.

    Its channels are 128 bytes of y: 64 of half precision, 32 of float32.
    """

    BLOCK_P: int
    BLOCK_Q: int
    NUM_WARPS: int
    reason: str = ""

    def blocks(self, spec: ConvSpec) -> int:
        """Tiles of one group of channels."""
        p, q = pooled(spec)
        return spec.n * -(-p // self.BLOCK_P) * -(-q // self.BLOCK_Q)

    def __str__(self) -> str:
        return f"{self.BLOCK_P}x{self.BLOCK_Q} pooled pixels warps {self.NUM_WARPS}"


CUDA_TILES = (
    StemTile(
        8, 7, 8, "17 x 15 convolution pixels fill 16 fragments but for one, and 56 x 56 whole"
    ),
    StemTile(3, 4, 4, "7 x 9 of them fill 4 but for one: for batches that would leave SMs idle"),
)


def cuda_tile(spec: ConvSpec, target: _hardware.Gpu | int) -> int:
    """The row of CUDA_TILES for a stem: the first, unless it gives less than a block per SM."""
    sms = _hardware.described(target).sms
    return 0 if CUDA_TILES[0].blocks(spec) >= sms else 1


def pooled(spec: ConvSpec) -> tuple[int, int]:
    """Height and width of y for the stem's convolution."""
    return conv_output_size(spec.p, 3, 2, 1, 1), conv_output_size(spec.q, 3, 2, 1, 1)


@dataclass(frozen=True, slots=True)
class Stem:
    """A stem as a backend sees it.

    Args:
        conv: its convolution; `aligned` says nothing of x, which the CUDA kernel reads anywhere.
        bytes: whether x is bytes.
        x_aligned: whether x starts at a multiple of 16 bytes.
    """

    conv: backends.Problem
    bytes: bool = False
    x_aligned: bool = True

    def normalized(self) -> backends.Problem:
        """The convolution that is left once bytes have become numbers, in a tensor made here."""
        if not self.bytes:
            return replace(self.conv, aligned=self.conv.aligned and self.x_aligned)
        spec = self.conv.spec
        strides = (spec.h * spec.w * spec.c, spec.w * spec.c, spec.c)
        return replace(self.conv, x="channels_last", x_strides=strides)


Run = Callable[..., Tensor]  # (x, weight, scale, shift, mean, var, eps, image_mean, image_std)
Tile = StemTile | TileConfig | None  # of the first kernel; None where there are no tiles


@dataclass(frozen=True, slots=True)
class StemBackend:
    """One way to run a stem.

    Args:
        name: as in `backends.BACKENDS`.
        refusal: why it cannot take a stem on this machine, or None.
        build: prepares a stem: what runs it, and the tile by which that cuts the work.
    """

    name: str
    refusal: Callable[[Stem], str | None]
    build: Callable[[Stem], tuple[Run, Tile]]


def plan(stem: Stem, backend: str = backends.AUTO) -> backends.Plan:
    """Choose a backend and let it prepare.

    Args:
        stem: what is to be run.
        backend: a backend's name, or "auto" for RESNET_FAST_BACKEND or else the table's order.

    Returns:
        A plan; its bind takes (weight, scale, shift, mean, var, eps, image_mean, image_std).

    Raises:
        ValueError: a backend asked for by argument refuses, or RESNET_FAST_BACKEND is unknown.
    """
    wanted = backend if backend != backends.AUTO else _env.backend() or backends.AUTO
    backends.check_name(wanted)
    return on_trial(functools.partial(_choose, stem, backend, wanted), backend)


def _choose(stem: Stem, backend: str, wanted: str, known: dict[str, str]) -> backends.Plan:
    refusals: dict[str, str] = {}
    for row in sorted(BACKENDS, key=lambda row: row.name != wanted):
        reason = known.get(row.name) or row.refusal(stem)
        if reason is None:
            run, tile = row.build(stem)
            return backends.Plan(stem.conv, row.name, refusals, _binder(run), tile=tile)
        if row.name == backend:
            text = f"backend {backend!r} cannot take the stem {stem.conv.spec}: {reason}"
            raise ValueError(f"resnet_fast: {text}")
        refusals[row.name] = reason
    raise AssertionError("aten refuses nothing")


def names() -> tuple[str, ...]:
    """What the `backend` argument may be."""
    return (backends.AUTO, *(row.name for row in BACKENDS))


def has_kernels(device: str) -> bool:
    """Whether there may be kernels of this op for the device that models should call it for."""
    return device == "cuda" or backends.triton_interprets()


def explain(stem: Stem) -> tuple[str, dict[str, str]]:
    """The first backend that takes the stem, and for each other why it does not run."""
    reasons = {row.name: row.refusal(stem) for row in BACKENDS}
    chosen = next(name for name, reason in reasons.items() if reason is None)
    others = {name: reason for name, reason in reasons.items() if name != chosen}
    return chosen, {name: why or f"{chosen} comes first" for name, why in others.items()}


def _binder(run: Run) -> backends.Bind:
    def launch(x, residual, inplace, *tensors) -> Tensor:
        return run(x, *tensors)

    def bind(weight, scale, shift, mean, var, eps, image_mean=None, image_std=None):
        vectors = (scale, shift, mean, var, eps)
        return backends.Direct(launch, weight, *vectors, image_mean, image_std)

    return bind


def new_output(spec: ConvSpec, device: torch.device) -> Tensor:  # [N, PP, PQ, K]
    """An uninitialised y of the stem's convolution, channels_last."""
    dtype, nhwc = getattr(torch, spec.dtype), torch.channels_last
    return torch.empty(
        (spec.n, spec.k, *pooled(spec)), dtype=dtype, device=device, memory_format=nhwc
    )


def normalize(
    x: Tensor,  # [N, 3, H, W]
    image_mean: Tensor | None,  # [3]
    image_std: Tensor | None,  # [3]
    dtype: torch.dtype,
) -> Tensor:  # [N, H, W, 3] where x is bytes
    """(x / 255 - mean) / std of bytes, in fp32 (or wider) and rounded once; else x itself."""
    if x.dtype != torch.uint8:
        return x
    wide = torch.promote_types(dtype, torch.float32)
    y = x.to(wide, memory_format=torch.channels_last).div_(255)
    if image_mean is not None and image_std is not None:
        y.sub_(image_mean.view(-1, 1, 1)).div_(image_std.view(-1, 1, 1))
    return y.to(dtype)


# ---- cuda: one kernel


def _cuda_refusal(stem: Stem) -> str | None:
    problem, spec = stem.conv, stem.conv.spec
    if problem.device != "cuda":
        return f"runs on cuda tensors, not {problem.device}"
    if reason := cuda.missing():
        return reason
    from resnet_fast.kernels import cuda as kernel

    if reason := kernel.architecture_refusal(problem.arch):
        return reason
    if spec.dtype not in CUDA_DTYPES:
        return f"dtype {spec.dtype}: the CUDA kernel takes {', '.join(CUDA_DTYPES)}"
    if spec.dtype == "float32" and spec.precision == "ieee":
        return (
            "float32 in IEEE precision: the CUDA kernel multiplies in TF32 "
            "(torch.backends.cudnn.conv.fp32_precision)"
        )
    if problem.weight != "channels_last":
        return f"weight is {problem.weight}, not channels_last"
    if not problem.vectors:
        return "scale, shift, mean or var is not contiguous"
    if spec.k % CUDA_CHANNELS:
        return f"K {spec.k}: the CUDA kernel takes multiples of {CUDA_CHANNELS}"
    if not problem.aligned:
        return "weight or a vector does not start at a multiple of 16 bytes"
    if CUDA_TILES[-1].blocks(spec) >= CUDA_TILES_LIMIT:
        return "so many images that the CUDA kernel's tiles do not count in 32 bits"
    return None


def _cuda_build(stem: Stem) -> tuple[Run, Tile]:
    from resnet_fast.kernels import cuda as kernel

    kernel.module()  # registers the op's implementation
    run = torch.ops.resnet_fast._stem_pool_cuda.default
    spec = stem.conv.spec
    tile = cuda_tile(spec, stem.conv.target)

    def launch(x, weight, scale, shift, mean, var, eps, image_mean, image_std) -> Tensor:
        y = new_output(spec, x.device)
        with on_device_of(x):
            run(x, weight, scale, shift, mean, var, eps, image_mean, image_std, tile, y)
        return y

    return launch, CUDA_TILES[tile]


# ---- triton, cpu: the backend's convolution, then its pool


def _conv_refusal(name: str, stem: Stem) -> str | None:
    (row,) = (row for row in backends.BACKENDS if row.name == name)
    interpreted = name == "triton" and backends.triton_interprets()
    if row.device != stem.conv.device and not interpreted:
        return f"runs on {row.device} tensors, not {stem.conv.device}"
    return row.missing() or row.refusal(stem.normalized())


def _two_steps(stem: Stem, name: str, pool: Callable[[Tensor], Tensor]) -> tuple[Run, Tile]:
    conv = backends.plan(stem.normalized(), name)

    def launch(x, weight, scale, shift, mean, var, eps, image_mean, image_std) -> Tensor:
        x = normalize(x, image_mean, image_std, weight.dtype)
        return pool(conv.bind(weight, scale, shift, mean, var, eps)(x, None))

    return launch, conv.tile


def _triton_build(stem: Stem) -> tuple[Run, Tile]:
    from resnet_fast.kernels import stem_pool as kernel

    spec = stem.conv.spec
    arch = stem.conv.arch or backends.INTERPRETED_ARCH
    map_shape = (spec.n, spec.p, spec.q, spec.k)
    run = kernel.build_max_pool(map_shape, getattr(torch, spec.dtype), True, arch=arch)

    def pool(y: Tensor) -> Tensor:
        out = new_output(spec, y.device)
        with on_device_of(y):
            run(y, out)
        return out

    return _two_steps(stem, "triton", pool)


def _cpu_pool(y: Tensor) -> Tensor:
    # It compares bit patterns, in which a NaN without its sign is the largest number.
    bits, magnitude = (torch.int16, 0x7FFF) if y.element_size() == 2 else (torch.int32, 0x7FFFFFFF)
    y.permute(0, 2, 3, 1).view(bits).bitwise_and_(magnitude)
    return cpu.max_pool_3x3_2(y)


# ---- aten


def reference(
    x: Tensor,  # [N, 3, H, W]
    weight: Tensor,  # [K, 7, 7, 3]
    scale: Tensor,  # [K]
    shift: Tensor,  # [K]
    mean: Tensor | None,  # [K]
    var: Tensor | None,  # [K]
    eps: float,
    image_mean: Tensor | None,  # [3]
    image_std: Tensor | None,  # [3]
) -> Tensor:  # [N, PP, PQ, K]
    """The op step by step in torch's own functions, at weight's dtype."""
    x = normalize(x, image_mean, image_std, weight.dtype)
    geometry = ((2, 2), (3, 3), (1, 1), 1, "relu")
    y = aten.conv_bn_act(x, weight, scale, shift, None, *geometry, mean, var, eps)
    return F.max_pool2d(y, 3, 2, 1).contiguous(memory_format=torch.channels_last)


BACKENDS = (
    StemBackend("cuda", _cuda_refusal, _cuda_build),
    StemBackend("triton", functools.partial(_conv_refusal, "triton"), _triton_build),
    StemBackend(
        "cpu",
        functools.partial(_conv_refusal, "cpu"),
        functools.partial(_two_steps, name="cpu", pool=_cpu_pool),
    ),
    StemBackend("aten", lambda stem: None, lambda stem: (reference, None)),
)
