# SPDX-License-Identifier: Apache-2.0
"""Ops that a backend without a kernel for them runs in steps: by its convolution, then the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from resnet_fast.dispatch.problem import (
    Binder,
    ConvProblem,
    JoinProblem,
    StemProblem,
    binder,
)
from resnet_fast.spec import Tile

Build = Callable[[ConvProblem, Tile | None], Binder]


def adding(problem: ConvProblem) -> ConvProblem:
    """A join's main convolution, to which the shortcut is added."""
    return replace(problem, spec=replace(problem.spec, residual=True), residual="channels_last")


def join(build: Build) -> Callable[[JoinProblem, None], Binder]:
    """The builder of a join from that of a convolution: the second adds what the first has made."""

    def build_join(problem: JoinProblem, tile: None = None) -> Binder:
        main, projection = build(adding(problem.main), tile), build(problem.projection, tile)

        def launch(
            weight, scale, shift, mean, var, eps,
            proj_weight, proj_scale, proj_shift, proj_mean, proj_var, proj_eps, h, x, *_,
        ) -> Tensor:  # fmt: skip
            vectors = (proj_scale, proj_shift, proj_mean, proj_var, proj_eps)
            shortcut = projection(proj_weight, *vectors)(x, None)
            return main(weight, scale, shift, mean, var, eps)(h, shortcut, True)

        return binder(launch)

    return build_join


def stem(
    build: Build, build_pool: Callable[[StemProblem], Callable[[Tensor], Tensor]]
) -> Callable[[StemProblem, Tile | None], Binder]:
    """The builder of a stem from those of a convolution and of a max-pool."""

    def build_stem(problem: StemProblem, tile: Tile | None = None) -> Binder:
        conv, pool = build(problem.normalized(), tile), build_pool(problem)

        def launch(weight, scale, shift, mean, var, eps, image_mean, image_std, x, *_) -> Tensor:
            x = normalize(x, image_mean, image_std, weight.dtype)
            return pool(conv(weight, scale, shift, mean, var, eps)(x, None))

        return binder(launch)

    return build_stem


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
