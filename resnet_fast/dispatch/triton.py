# SPDX-License-Identifier: Apache-2.0
"""The backend `triton`: the kernels of `resnet_fast/kernels`, compiled when they are first run.

Nothing here imports Triton before a problem has passed every cheaper question. Its interpreter runs
the same kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fast import _env, _hardware
from resnet_fast.dispatch import steps, tiles
from resnet_fast.dispatch.problem import (
    INTERPRETED_ARCH,
    Binder,
    ConvProblem,
    JoinProblem,
    MaskProblem,
    StemProblem,
    SumProblem,
    binder,
    layout_refusal,
    new_output,
    new_pooled,
    on_device_of,
    sum_binder,
    sum_refusal,
)
from resnet_fast.dispatch.row import Row
from resnet_fast.spec import ConvSpec, JoinSpec, StemSpec, TileConfig


def missing(arch: int) -> str | None:
    """Why Triton cannot be used on this machine, or on a GPU of that architecture; or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton; Linux only)"
    if _env.triton_interprets():
        return None
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    if _hardware.nearest_architecture(arch) is None:
        return f"compute capability {arch / 10} is below 8.0"
    from resnet_fast.kernels import launch

    return launch.driver_fault()


# ---- a convolution


def conv_refusal(problem: ConvProblem) -> str | None:
    from resnet_fast.kernels import conv_bn_act as kernel

    return layout_refusal(problem) or kernel.refusal(problem.spec)


def conv_build(problem: ConvProblem, tile: TileConfig) -> Binder:
    from resnet_fast.kernels import conv_bn_act as kernel

    spec, arch = problem.spec, problem.arch or INTERPRETED_ARCH
    operands = kernel.Operands(problem.x_strides, problem.vector_dtypes, problem.aligned)
    run = kernel.build(spec, tile, operands, arch=arch)

    def launch(
        weight, scale, shift, mean, var, eps, x, residual, inplace=False, finite=False
    ) -> Tensor:
        y = residual if inplace else new_output(x, spec)
        with on_device_of(x):
            run(x, weight.to(x.dtype), scale, shift, mean, var, eps, residual, y)
        return y

    return binder(launch)


# ---- a join


def join_refusal(problem: JoinProblem) -> str | None:
    for name, (part, weight) in problem.parts.items():
        if part.x not in ("channels_last", "channels_inner"):
            return f"{name} is {part.x}, not channels_last"
        if part.weight != "channels_last":
            return f"{weight} is {part.weight}, not channels_last"
        if not part.vectors:
            return f"a vector of {weight}'s BatchNorm is not contiguous"
    from resnet_fast.kernels import conv_bn_join as kernel

    return kernel.refusal(problem.spec)


def join_build(problem: JoinProblem, tile: TileConfig) -> Binder:
    from resnet_fast.kernels import conv_bn_join as kernel

    main, projection, spec = problem.main, problem.projection, problem.spec
    operands = kernel.Operands(
        main.x_strides, projection.x_strides, main.vector_dtypes, projection.vector_dtypes,
        main.aligned and projection.aligned,
    )  # fmt: skip
    run = kernel.build(spec, tile, operands, arch=problem.arch or INTERPRETED_ARCH)

    def launch(
        weight, scale, shift, mean, var, eps,
        proj_weight, proj_scale, proj_shift, proj_mean, proj_var, proj_eps, h, x, *_,
    ) -> Tensor:  # fmt: skip
        y = new_output(h, spec.main)
        with on_device_of(h):
            run(
                h, weight.to(h.dtype), scale, shift, mean, var, eps, x, proj_weight.to(x.dtype),
                proj_scale, proj_shift, proj_mean, proj_var, proj_eps, y,
            )  # fmt: skip
        return y

    return binder(launch)


# ---- a stem's pool, behind the convolution's kernel


def stem_refusal(problem: StemProblem) -> str | None:
    return conv_refusal(problem.normalized())


def _build_pool(problem: StemProblem) -> Callable[[Tensor], Tensor]:
    from resnet_fast.kernels import stem_pool as kernel

    spec, conv = problem.spec, problem.spec.conv
    map_shape, dtype = (conv.n, conv.p, conv.q, conv.k), getattr(torch, spec.dtype)
    run = kernel.build_max_pool(map_shape, dtype, True, arch=problem.arch or INTERPRETED_ARCH)

    def pool(y: Tensor) -> Tensor:
        out = new_pooled(spec, y.device)
        with on_device_of(y):
            run(y, out)
        return out

    return pool


# ---- relu(x + y), and its gradient


def sum_build(problem: SumProblem, tile: None, gradient: bool) -> Binder:
    from resnet_fast.kernels import add_relu as kernel

    dtype, arch = getattr(torch, problem.spec.dtype), problem.arch or INTERPRETED_ARCH
    run = kernel.build(problem.spec.numel, dtype, problem.aligned, arch=arch, gradient=gradient)
    return sum_binder(run)


_row = functools.partial(
    Row, backend="triton", device="cuda", anywhere=_env.triton_interprets, missing=missing,
    fuses=True, tried=True,
)  # fmt: skip
ROWS = (
    _row(ConvProblem.op, build=conv_build, refusal=conv_refusal, family=tiles.TRITON[ConvSpec]),
    _row(JoinProblem.op, build=join_build, refusal=join_refusal, family=tiles.TRITON[JoinSpec]),
    _row(StemProblem.op, build=steps.stem(conv_build, _build_pool), refusal=stem_refusal,
         family=tiles.TRITON[StemSpec]),
    _row(SumProblem.op, build=functools.partial(sum_build, gradient=False), refusal=sum_refusal),
    _row(MaskProblem.op, build=functools.partial(sum_build, gradient=True), refusal=sum_refusal),
)  # fmt: skip
