# SPDX-License-Identifier: Apache-2.0
"""What a backend is asked and what it answers: `Problem` -> refusal, or binder -> runner.

problem   one op's work and how its tensors lie; frozen, without any tensor
binder    what a backend prepares for a problem: binder(*a layer's tensors) -> runner
runner    runner(*a call's tensors) -> y
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from resnet_fast import _hardware
from resnet_fast.spec import ConvSpec, JoinSpec, Spec, StemSpec, SumSpec

INTERPRETED_ARCH = 80  # whose tiles Triton's interpreter runs
NHWC = "channels_last"
SUM_DTYPES = ("float16", "bfloat16", "float32")


class Problem:
    """What the table reads of any op's problem. Backends read more: what their op's class adds.

    Args:
        op: the op's name.
        spec: what is computed.
        device: "cpu", "cuda", ...
        arch: compute capability times ten of a CUDA device, else 0.
        gpu: the name of a CUDA device, as measured choices are kept under it; "" for no measured
            choices.
        hardware: what that device can hold and move; None for what stands for `arch`.
        product: the convolution whose arithmetic and bytes set the time; None where there is none.
        is_empty: whether the result has no elements, so that nothing needs to run.
    """

    __slots__ = ()
    op: ClassVar[str]
    spec: Spec
    device: str
    arch: int
    gpu: str
    hardware: _hardware.Gpu | None
    product: ConvSpec | None = None

    @property
    def target(self) -> _hardware.Gpu | int:
        """What a tile is chosen for: the GPU, or else its architecture."""
        return self.hardware or self.arch or INTERPRETED_ARCH

    @property
    def is_empty(self) -> bool:
        return False

    def in_usual_layout(self) -> Problem | None:
        """The same after `model.to(memory_format=torch.channels_last)`; None if nothing changes."""
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvProblem(Problem):
    """A convolution.

    Args:
        x, weight, residual: how the tensor lies in memory: "channels_last", "channels_inner"
            (channels adjacent, the rest strided, as in a slice), "contiguous" or "strided";
            residual is "" where there is none.
        x_strides: of x along (n, h, w), in elements.
        vectors: whether scale, shift, mean and var are contiguous.
        vector_dtypes: of scale, shift, mean and var; None where one is not given.
        tracked: whether changes of the weight can be seen (tensors made under
            torch.inference_mode() have no version counter).
        aligned: whether every tensor starts at a multiple of 16 bytes.
    """

    op: ClassVar[str] = "conv_bn_act"
    spec: ConvSpec
    device: str
    arch: int = 0
    gpu: str = ""
    hardware: _hardware.Gpu | None = None
    x: str
    weight: str
    residual: str
    x_strides: tuple[int, int, int]
    vectors: bool
    vector_dtypes: tuple[str | None, ...]
    tracked: bool
    aligned: bool

    @classmethod
    def usual(cls, spec: ConvSpec, **where) -> ConvProblem:
        """As models ask for it: channels_last, aligned, in one dtype."""
        norm = spec.dtype if spec.norm else None
        return cls(
            spec=spec, **where, x=NHWC, weight=NHWC, residual=NHWC if spec.residual else "",
            x_strides=(spec.h * spec.w * spec.c, spec.w * spec.c, spec.c), vectors=True,
            vector_dtypes=(spec.dtype, spec.dtype, norm, norm), tracked=True, aligned=True,
        )  # fmt: skip

    @property
    def product(self) -> ConvSpec:
        return self.spec

    @property
    def is_empty(self) -> bool:
        return self.spec.m * self.spec.k == 0

    def in_usual_layout(self) -> ConvProblem | None:
        return replace(self, weight=NHWC) if self.weight == "contiguous" else None


@dataclass(frozen=True, slots=True)
class JoinProblem(Problem):
    """Two convolutions whose results are added.

    Args:
        main: the convolution of h, without a residual.
        projection: the one of x.
    """

    op: ClassVar[str] = "conv_bn_join"
    main: ConvProblem
    projection: ConvProblem

    @classmethod
    def usual(cls, spec: JoinSpec, **where) -> JoinProblem:
        """As models ask for it: see `ConvProblem.usual`."""
        parts = (ConvProblem.usual(part, **where) for part in (spec.main, spec.projection))
        return cls(*parts)

    @property
    def spec(self) -> JoinSpec:
        return JoinSpec(self.main.spec, self.projection.spec)

    device = property(lambda self: self.main.device)
    arch = property(lambda self: self.main.arch)
    gpu = property(lambda self: self.main.gpu)
    hardware = property(lambda self: self.main.hardware)
    product = property(lambda self: self.spec.as_one_product)
    is_empty = property(lambda self: self.main.is_empty)

    @property
    def parts(self) -> dict[str, tuple[ConvProblem, str]]:
        """By the name of its map: each convolution, and what its weight is called."""
        return {"h": (self.main, "weight"), "x": (self.projection, "proj_weight")}


@dataclass(frozen=True, slots=True, kw_only=True)
class StemProblem(Problem):
    """A stem.

    Args:
        conv: its convolution; `aligned` says nothing of x, which the CUDA kernel reads anywhere.
        image: whether x is bytes.
        x_aligned: whether x starts at a multiple of 16 bytes.
    """

    op: ClassVar[str] = "stem_pool"
    conv: ConvProblem
    image: bool = False
    x_aligned: bool = True

    @classmethod
    def usual(cls, spec: StemSpec, **where) -> StemProblem:
        """As models ask for it: see `ConvProblem.usual`."""
        return cls(conv=ConvProblem.usual(spec.conv, **where))

    @property
    def spec(self) -> StemSpec:
        return StemSpec(self.conv.spec)

    device = property(lambda self: self.conv.device)
    arch = property(lambda self: self.conv.arch)
    gpu = property(lambda self: self.conv.gpu)
    hardware = property(lambda self: self.conv.hardware)
    is_empty = property(lambda self: self.conv.is_empty)

    def normalized(self) -> ConvProblem:
        """The convolution that is left once bytes have become numbers, in a tensor made here."""
        if not self.image:
            return replace(self.conv, aligned=self.conv.aligned and self.x_aligned)
        spec = self.conv.spec
        strides = (spec.h * spec.w * spec.c, spec.w * spec.c, spec.c)
        return replace(self.conv, x=NHWC, x_strides=strides)


@dataclass(frozen=True, slots=True, kw_only=True)
class SumProblem(Problem):
    """An element-by-element op of two tensors.

    Args:
        dense: whether both are dense, in one memory order.
        aligned: whether both start at a multiple of 16 bytes.
    """

    op: ClassVar[str] = "add_relu"
    spec: SumSpec
    device: str
    arch: int = 0
    gpu: str = ""
    hardware: _hardware.Gpu | None = None
    dense: bool = True
    aligned: bool = True

    @classmethod
    def usual(cls, spec: SumSpec, **where) -> SumProblem:
        """As models ask for it."""
        return cls(spec=spec, **where)

    @property
    def is_empty(self) -> bool:
        return self.spec.numel == 0


class MaskProblem(SumProblem):
    """The gradient of `add_relu`, masked by its result."""

    __slots__ = ()
    op = "_add_relu_backward"


class Runner(functools.partial):
    """A kernel bound to a layer's tensors, which it reads at each call: `Runner(kernel, *tensors)`.

    Called with the tensors of a call it returns y. A convolution's takes
    (x, residual, inplace=False, finite=False): with `inplace` y is written over residual; `finite`
    tells it that no value can be NaN or infinite. A join's takes (h, x), a stem's (x,), and both
    leave what follows unread.

    `growth` is (gain, offset): results are at most gain * (largest input) + offset, the shortcut
    apart; or None where the backend has no use for the knowledge that all values are finite.
    """

    growth: tuple[float, float] | None = None

    def fresh(self, weight: Tensor) -> bool:
        """Whether it still stands for the layer, whose tensors are known to be where they were."""
        return True


Binder = Callable[..., Runner]  # what a backend prepares; see the module's docstring


def binder(kernel: Callable[..., Tensor]) -> Binder:
    """The binder of a kernel that is called with a layer's tensors, then those of a call."""
    return functools.partial(Runner, kernel)


def sum_binder(run: Callable[[Tensor, Tensor, Tensor], None]) -> Binder:
    """The binder of a kernel that writes an element-by-element op of two tensors into a third."""

    def launch(x: Tensor, y: Tensor) -> Tensor:
        out = torch.empty_like(x)
        with on_device_of(x):
            run(x, y, out)
        return out

    return binder(launch)


def layout_refusal(problem: ConvProblem) -> str | None:
    """What every fused GPU kernel needs of its tensors' layout, and is not so; else None."""
    if problem.x not in (NHWC, "channels_inner"):
        return f"x is {problem.x}, not channels_last"
    if problem.weight != NHWC:
        return f"weight is {problem.weight}, not channels_last"
    if problem.residual not in ("", NHWC):
        return f"residual is {problem.residual}, not channels_last"
    if not problem.vectors:
        return "scale, shift, mean or var is not contiguous"
    return None


def sum_refusal(problem: SumProblem) -> str | None:
    """Why an element-by-element kernel cannot take `problem`, or None."""
    if problem.spec.dtype not in SUM_DTYPES:
        return f"takes {SUM_DTYPES}, not {problem.spec.dtype}"
    return None if problem.dense else "the tensors are not dense in one memory order"


def new_output(x: Tensor, spec: ConvSpec) -> Tensor:  # [N, P, Q, K]
    """An uninitialised y of `spec` beside x, channels_last."""
    shape = (spec.n, spec.k, spec.p, spec.q)
    nhwc = torch.channels_last
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=nhwc)


def new_pooled(spec: StemSpec, device: torch.device) -> Tensor:  # [N, PP, PQ, K]
    """An uninitialised y of a stem, channels_last."""
    shape, dtype = (spec.conv.n, spec.conv.k, *spec.pooled), getattr(torch, spec.dtype)
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


def on_device_of(x: Tensor):
    """Kernels are launched on the current device: make it x's where it is another."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
