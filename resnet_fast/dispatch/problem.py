# SPDX-License-Identifier: Apache-2.0
"""What a backend is asked and what it answers: `Problem` -> refusal, or bind -> launch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from resnet_fast import _hardware
from resnet_fast.spec import ConvSpec, TileConfig

INTERPRETED_ARCH = 80  # whose tiles Triton's interpreter runs


@dataclass(frozen=True, slots=True)
class Problem:
    """A convolution as a backend sees it: what is computed, where, and how its tensors lie.

    Args:
        spec: the convolution.
        device: "cpu", "cuda", ...
        arch: compute capability times ten of a CUDA device, else 0.
        x, weight, residual: how the tensor lies in memory: "channels_last", "channels_inner"
            (channels adjacent, the rest strided, as in a slice), "contiguous" or "strided";
            residual is "" where there is none.
        x_strides: of x along (n, h, w), in elements.
        vectors: whether scale, shift, mean and var are contiguous.
        vector_dtypes: of scale, shift, mean and var; None where one is not given.
        tracked: whether changes of the weight can be seen (tensors made under
            torch.inference_mode() have no version counter).
        aligned: whether every tensor starts at a multiple of 16 bytes.
        gpu: the name of a CUDA device, as measured choices are kept under it; "" for no measured
            choices.
        hardware: what that device can hold and move; None for what stands for `arch`.
    """

    spec: ConvSpec
    device: str
    arch: int
    x: str
    weight: str
    residual: str
    x_strides: tuple[int, int, int]
    vectors: bool
    vector_dtypes: tuple[str | None, ...]
    tracked: bool
    aligned: bool
    gpu: str = ""
    hardware: _hardware.Gpu | None = None

    @property
    def target(self) -> _hardware.Gpu | int:
        """What a tile is chosen for: the GPU, or else its architecture."""
        return self.hardware or self.arch


class Launch(Protocol):
    """A convolution bound to a layer's tensors.

    Args:
        growth: (gain, offset): results are at most gain * (largest input) + offset, shortcut apart;
            or None where the backend has no use for the knowledge that all values are finite.
    """

    growth: tuple[float, float] | None

    def __call__(
        self, x: Tensor, residual: Tensor | None, inplace: bool = False, finite: bool = False
    ) -> Tensor:
        """Run it: y, [N, P, Q, K] in memory; with `inplace` written over residual.

        `finite`: the caller knows that no value can be NaN or infinite.
        """

    def fresh(self, weight: Tensor) -> bool:
        """Whether it still stands for the layer, whose tensors are known to be where they were."""


Bind = Callable[..., Launch]  # (weight, scale, shift, mean, var, eps) -> Launch


class Direct:
    """A `Launch` that keeps nothing of the layer but the tensors themselves: always fresh."""

    __slots__ = ("function", "tensors")
    growth = None

    def __init__(self, function: Callable[..., Tensor], *tensors) -> None:
        self.function, self.tensors = function, tensors

    def __call__(
        self, x: Tensor, residual: Tensor | None, inplace: bool = False, finite: bool = False
    ) -> Tensor:
        return self.function(x, residual, inplace, *self.tensors)

    def fresh(self, weight: Tensor) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to run a fused convolution.

    Args:
        name: what `report`, RESNET_FAST_BACKEND and the ops' `backend` argument call it.
        device: the device type it needs, or None for any.
        missing: why it cannot run on this machine at all, or None.
        refusal: why it cannot take a `Problem`, or None.
        build: prepares a `Problem`: all that can be kept between calls is made here; the bind it
            returns is called with the tensors of a layer, its launch with those of a call. The
            tile is a measured choice, or None for what `choose` gives.
        by_name: why it is taken only where it is asked for by name; "" for any other backend.
        choose: the tile by which its kernel cuts a `Problem`; None where it has none to choose.
    """

    name: str
    device: str | None
    missing: Callable[[], str | None]
    refusal: Callable[[Problem], str | None]
    build: Callable[[Problem, TileConfig | None], Bind]
    by_name: str = ""
    choose: Callable[[Problem], TileConfig | None] = lambda problem: None


def triton_interprets() -> bool:
    """Whether Triton's interpreter is on, which runs the GPU kernels on CPU tensors for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def layout_refusal(problem: Problem) -> str | None:
    """What every fused GPU kernel needs of its tensors' layout, and is not so; else None."""
    if problem.x not in ("channels_last", "channels_inner"):
        return f"x is {problem.x}, not channels_last"
    if problem.weight != "channels_last":
        return f"weight is {problem.weight}, not channels_last"
    if problem.residual not in ("", "channels_last"):
        return f"residual is {problem.residual}, not channels_last"
    if not problem.vectors:
        return "scale, shift, mean or var is not contiguous"
    return None


def new_output(x: Tensor, spec: ConvSpec) -> Tensor:  # [N, P, Q, K]
    """An uninitialised y of `spec` beside x, channels_last."""
    shape = (spec.n, spec.k, spec.p, spec.q)
    nhwc = torch.channels_last
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=nhwc)


def on_device_of(x: Tensor):
    """Kernels are launched on the current device: make it x's where it is another."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
