# SPDX-License-Identifier: Apache-2.0
"""The backends: one row each, and each row says what it refuses and why.

    name    device     what it runs
    triton  cuda       kernels/conv_bn_act.py: one kernel for conv, BatchNorm, residual and ReLU
    cpu     cpu        kernels/cpu.py: oneDNN's fused convolution on weights packed once
    aten    any        kernels/aten.py: torch's own functions, unfused; refuses nothing

The first row that does not refuse is taken, unless one is asked for by name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from resnet_fast import _env, _hardware
from resnet_fast.kernels import aten, cpu
from resnet_fast.spec import ConvSpec

AUTO = "auto"
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
            returns is called with the tensors of a layer, its launch with those of a call.
    """

    name: str
    device: str | None
    missing: Callable[[], str | None]
    refusal: Callable[[Problem], str | None]
    build: Callable[[Problem], Bind]


@dataclass(slots=True)
class Plan:
    """A problem, the backend that was chosen for it, and why the others were not."""

    problem: Problem
    backend: str
    refusals: dict[str, str]
    bind: Bind
    calls: int = 0

    def why_fallback(self) -> str:
        """Why no fused kernel of this device took the problem; empty where one did."""
        if self.backend != "aten":
            return ""
        devices = {row.name: row.device for row in BACKENDS}
        why = [r for name, r in self.refusals.items() if devices[name] == self.problem.device]
        return "; ".join(why) or f"no fused kernel for {self.problem.device}"


def plan(problem: Problem, backend: str = AUTO) -> Plan:
    """Choose a backend for `problem` and let it prepare.

    Args:
        problem: what is to be run.
        backend: a backend's name, or "auto" for RESNET_FAST_BACKEND or else the table's order.

    Raises:
        ValueError: an unknown backend, of either kind, or one asked for by argument that refuses.
    """
    wanted = backend if backend != AUTO else _env.backend() or AUTO
    check_name(wanted)
    rows = sorted(BACKENDS, key=lambda row: row.name != wanted)
    refusals: dict[str, str] = {}
    for row in rows:
        reason = _refusal(row, problem)
        if reason is None:
            return Plan(problem, row.name, refusals, row.build(problem))
        if row.name == backend:
            text = f"backend {backend!r} cannot take {problem.spec}: {reason}"
            raise ValueError(f"resnet_fast: {text}")
        refusals[row.name] = reason
    raise AssertionError("aten refuses nothing")


def explain(problem: Problem) -> tuple[str, dict[str, str]]:
    """The first backend that takes `problem`, and for each other why it does not run."""
    return _first({row.name: _refusal(row, problem) for row in BACKENDS})


def names() -> list[str]:
    """What the `backend` argument may be."""
    return [AUTO, *(row.name for row in BACKENDS)]


def check_name(backend: str) -> None:
    """Raise ValueError unless `backend` is a backend's name or "auto"."""
    if backend not in names():
        raise ValueError(f"resnet_fast: unknown backend {backend!r}; known are {names()}")


def _refusal(row: Backend, problem: Problem) -> str | None:
    interpreted = row.name == "triton" and triton_interprets()
    if row.device not in (None, problem.device) and not interpreted:
        return f"runs on {row.device} tensors, not {problem.device}"
    return row.missing() or row.refusal(problem)


def triton_interprets() -> bool:
    """Whether Triton's interpreter is on, which runs the GPU kernels on CPU tensors for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# ---- triton


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton; Linux only)"
    if not triton_interprets() and not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    return None


def _triton_refusal(problem: Problem) -> str | None:
    if not triton_interprets() and _hardware.nearest_architecture(problem.arch) is None:
        return f"compute capability {problem.arch / 10} is below 8.0"
    if problem.x not in ("channels_last", "channels_inner"):
        return f"x is {problem.x}, not channels_last"
    if problem.weight != "channels_last":
        return f"weight is {problem.weight}, not channels_last"
    if problem.residual not in ("", "channels_last"):
        return f"residual is {problem.residual}, not channels_last"
    if not problem.vectors:
        return "scale, shift, mean or var is not contiguous"
    from resnet_fast.dispatch import heuristics
    from resnet_fast.kernels import conv_bn_act as kernel

    reason = kernel.refusal(problem.spec)
    if reason is not None:
        return reason
    try:
        heuristics.choose(problem.spec, problem.arch or INTERPRETED_ARCH)
    except ValueError as error:
        return str(error)
    return None


def _triton_build(problem: Problem) -> Bind:
    from resnet_fast.dispatch import heuristics
    from resnet_fast.kernels import conv_bn_act as kernel

    spec, arch = problem.spec, problem.arch or INTERPRETED_ARCH
    operands = kernel.Operands(problem.x_strides, problem.vector_dtypes, problem.aligned)
    run = kernel.build(spec, heuristics.choose(spec, arch), operands, arch=arch)
    shape = (spec.n, spec.k, spec.p, spec.q)

    def launch(x, residual, inplace, weight, scale, shift, mean, var, eps) -> Tensor:
        y = residual
        if not inplace:
            nhwc = torch.channels_last
            y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=nhwc)
        with _on_device_of(x):
            run(x, weight.to(x.dtype), scale, shift, mean, var, eps, residual, y)
        return y

    return lambda *tensors: Direct(launch, *tensors)


def _on_device_of(x: Tensor):
    """Triton launches on the current device: make it x's where it is another."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


# ---- cpu


def _cpu_refusal(problem: Problem) -> str | None:
    if problem.x != "channels_last":
        return f"x is {problem.x}, not channels_last"
    if problem.residual not in ("", "channels_last"):
        return f"residual is {problem.residual}, not channels_last"
    if problem.weight not in ("channels_last", "contiguous"):
        return f"weight is {problem.weight}, neither contiguous nor channels_last"
    if not problem.vectors:
        return "scale, shift, mean or var is not contiguous"
    if not problem.tracked:
        return (
            "weight was made under torch.inference_mode(), so a packed copy could go stale unseen; "
            "build or load the model outside of it"
        )
    return cpu.refusal(problem.spec)


def _cpu_build(problem: Problem) -> Bind:
    return cpu.build(problem.spec)


# ---- aten


def _aten_build(problem: Problem) -> Bind:
    spec = problem.spec
    geometry = (spec.stride, spec.padding, spec.dilation, spec.groups, spec.activation)

    def launch(x, residual, inplace, weight, scale, shift, mean, var, eps) -> Tensor:
        vectors = (mean, var, eps)
        narrow = weight.to(x.dtype)
        y = aten.conv_bn_act(x, narrow, scale, shift, residual, *geometry, *vectors)
        return residual.copy_(y) if inplace else y

    return lambda *tensors: Direct(launch, *tensors)


def _nothing(*_) -> None:
    return None


BACKENDS = (
    Backend("triton", "cuda", _triton_missing, _triton_refusal, _triton_build),
    Backend("cpu", "cpu", _nothing, _cpu_refusal, _cpu_build),
    Backend("aten", None, _nothing, _nothing, _aten_build),
)


# ---- add_relu: no spec, no plan; dense tensors of one layout, or aten

ADD_RELU_DTYPES = ("float16", "bfloat16", "float32")


def add_relu(x: Tensor, y: Tensor) -> Tensor:
    """relu(x + y) by the first backend that takes it."""
    dense = x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )
    if not dense or x.stride() != y.stride() or x.numel() == 0:
        return aten.add_relu(x, y)
    chosen, _ = explain_add_relu(x.device.type, str(x.dtype).removeprefix("torch."))
    if chosen == "triton":
        return _triton_add_relu(x, y)
    return cpu.add_relu(x, y) if chosen == "cpu" else aten.add_relu(x, y)


def _triton_add_relu(x: Tensor, y: Tensor) -> Tensor:
    from resnet_fast.kernels import add_relu as kernel

    out = torch.empty_like(x)
    with _on_device_of(x):
        _add_relu_launch(x.numel(), x.dtype, kernel.is_aligned(x, y, out), x.device)(x, y, out)
    return out


@functools.lru_cache(maxsize=1024)
def _add_relu_launch(numel: int, dtype: torch.dtype, aligned: bool, device: torch.device):
    from resnet_fast.kernels import add_relu as kernel

    arch = _hardware.capability_of(device) if device.type == "cuda" else INTERPRETED_ARCH
    return kernel.build(numel, dtype, aligned, arch=arch)


@functools.cache
def explain_add_relu(device: str, dtype: str) -> tuple[str, dict[str, str]]:
    """The first backend that takes dense tensors of a dtype, and for each other why not."""
    known = dtype in ADD_RELU_DTYPES
    reasons = {}
    for row in BACKENDS:
        reason = None
        if row.device not in (None, device):
            reason = f"runs on {row.device} tensors, not {device}"
        elif row.name != "aten":
            reason = row.missing() or (None if known else f"takes {ADD_RELU_DTYPES}, not {dtype}")
        reasons[row.name] = reason
    return _first(reasons)


def _first(reasons: dict[str, str | None]) -> tuple[str, dict[str, str]]:
    chosen = next(name for name, reason in reasons.items() if reason is None)
    others = {name: reason for name, reason in reasons.items() if name != chosen}
    return chosen, {name: why or f"{chosen} comes first" for name, why in others.items()}
