# SPDX-License-Identifier: Apache-2.0
"""The backends: one row each, and each row says what it refuses and why.

    name    device     what it runs
    cuda    cuda       csrc/cuda: one C++ kernel for conv, BatchNorm, residual and ReLU
    triton  cuda       kernels/conv_bn_act.py: the same in Triton
    cpu     cpu        kernels/cpu.py: oneDNN's fused convolution on weights packed once
    aten    any        kernels/aten.py: torch's own functions, unfused; refuses nothing
    cudnn   cuda       kernels/aten.py: cuDNN's fused convolution; only where asked for by name

They are asked in this order: the one named by argument or by RESNET_FAST_BACKEND, what
`resnet-fast tune` measured (tuning.py), what is preferred for the GPU and the kind of convolution
(preferences.py), this table. The first that does not refuse is taken.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resnet_fast import _env, _hardware, _names
from resnet_fast.dispatch import cuda, tuning
from resnet_fast.dispatch.preferences import preference
from resnet_fast.dispatch.problem import (
    INTERPRETED_ARCH,
    Backend,
    Bind,
    Direct,
    Launch,
    Problem,
    layout_refusal,
    new_output,
    on_device_of,
    triton_interprets,
)
from resnet_fast.dispatch.trial import TRIED, on_trial, reason_to_pass_on
from resnet_fast.kernels import aten, cpu
from resnet_fast.spec import TileConfig

__all__ = [
    "AUTO",
    "BACKENDS",
    "INTERPRETED_ARCH",
    "Backend",
    "Bind",
    "Direct",
    "Launch",
    "Plan",
    "Problem",
    "add_relu",
    "check_name",
    "explain",
    "explain_add_relu",
    "names",
    "plan",
    "triton_interprets",
    "why_not",
]

AUTO = "auto"
ASKED = "asked for"


@dataclass(slots=True)
class Plan:
    """A problem, the backend that was chosen for it and why, and why those before it were not.

    `tile` is how its kernel cuts the work, printable; None where the backend has no tiles. `failed`
    is a backend that was chosen before and could not launch, and why.
    """

    problem: Problem
    backend: str
    refusals: dict[str, str]
    bind: Bind
    calls: int = 0
    why: str = ""
    tile: object = None
    failed: str = ""

    def why_fallback(self) -> str:
        """Why no fused kernel of this device took the problem, or the one that was to failed."""
        if self.backend != "aten":
            return self.failed
        if self.why == ASKED:
            return "backend aten was asked for, which fuses nothing"
        fused = {row.name for row in BACKENDS if row.device == self.problem.device}
        why = [reason for name, reason in self.refusals.items() if name in fused]
        return "; ".join(why) or f"no fused kernel for {self.problem.device}"


def plan(problem: Problem, backend: str = AUTO) -> Plan:
    """Choose a backend for `problem` and let it prepare.

    Args:
        problem: what is to be run.
        backend: a backend's name, or "auto" for the order that this module's docstring tells.

    Raises:
        ValueError: an unknown backend, of either kind, or one asked for by argument that refuses.
    """
    wanted = backend if backend != AUTO else _env.backend() or AUTO
    check_name(wanted)
    return on_trial(functools.partial(_choose, problem, backend, wanted), backend)


def _choose(problem: Problem, backend: str, wanted: str, known: dict[str, str]) -> Plan:
    spec = problem.spec
    measured = tuning.measured(problem.gpu, spec)
    refusals: dict[str, str] = {}
    for row, why in _in_order(problem, wanted, measured):
        reason = known.get(row.name) or why_not(row, problem, asked=row.name == wanted)
        if reason is None:
            tile = tuning.tile_of(measured, row.name, spec, problem.target) if measured else None
            tile = tile or row.choose(problem)
            bind = row.build(problem, tile)
            if row.name == "aten" != wanted and _only_layout_is_amiss(problem):
                _warn_of_contiguous_weights()
            return Plan(problem, row.name, refusals, bind, why=why, tile=tile)
        if row.name == backend:
            text = f"backend {backend!r} cannot take {spec}: {reason}"
            raise ValueError(f"resnet_fast: {text}")
        refusals[row.name] = reason
    raise AssertionError("aten refuses nothing")


def _only_layout_is_amiss(problem: Problem) -> bool:
    """Whether a GPU's kernel would take the problem if its weight were channels_last."""
    if problem.device != "cuda" or problem.weight != "contiguous":
        return False
    turned = replace(problem, weight="channels_last")
    return any(why_not(row, turned) is None for row in BACKENDS if row.device == "cuda")


@functools.cache
def _warn_of_contiguous_weights() -> None:
    """Once in a process: one call repairs all layers of a model."""
    warnings.warn(
        "resnet_fast: convolutions with contiguous weights run unfused on this GPU, whose fused "
        "kernels read channels_last; call model.to(memory_format=torch.channels_last) once",
        stacklevel=2,
    )


def _in_order(
    problem: Problem, wanted: str, measured: tuple[tuning.Choice, ...]
) -> Iterator[tuple[Backend, str]]:
    """The backends in the order in which they are asked, each with why it stands where it does."""
    rows = {row.name: row for row in BACKENDS}
    preferred = preference(problem.spec, problem.target) if problem.device == "cuda" else None
    reasons = [(wanted, ASKED)]
    reasons += [(c.backend, f"measured: {c.microseconds:.1f} us") for c in measured]
    if preferred:
        first, *others = preferred.order
        reasons += [(first, preferred.reason), *((name, "") for name in others)]
    reasons += [(row.name, "") for row in BACKENDS]
    for name, why in reasons:
        row = rows.pop(name, None)
        if row is not None:
            yield row, why


def explain(problem: Problem) -> tuple[str, dict[str, str]]:
    """The first backend that takes `problem`, and for each other why it does not run."""
    measured = tuning.measured(problem.gpu, problem.spec)
    rows = list(_in_order(problem, AUTO, measured))
    whys = {row.name: why for row, why in rows}
    return _first({row.name: why_not(row, problem) for row, _ in rows}, whys)


def names() -> list[str]:
    """What the `backend` argument may be."""
    return [AUTO, *(row.name for row in BACKENDS)]


def devices() -> dict[str, str | None]:
    """The device type that each backend runs on; None for any."""
    return {row.name: row.device for row in BACKENDS}


def check_name(backend: str) -> None:
    """Raise ValueError unless `backend` is a backend's name or "auto"."""
    if backend not in names():
        raise ValueError(f"resnet_fast: {_names.unknown('backend', backend, names())}")


def why_not(row: Backend, problem: Problem, asked: bool = False) -> str | None:
    """Why a backend does not take `problem` here, `asked` for by name or not; None if it does."""
    interpreted = row.name == "triton" and triton_interprets()
    if row.device not in (None, problem.device) and not interpreted:
        return f"runs on {row.device} tensors, not {problem.device}"
    if row.by_name and not asked:
        return row.by_name
    return row.missing() or row.refusal(problem)


# ---- triton


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton; Linux only)"
    if triton_interprets():
        return None
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    from resnet_fast.kernels import launch

    return launch.driver_fault()


def _triton_refusal(problem: Problem) -> str | None:
    if not triton_interprets() and _hardware.nearest_architecture(problem.arch) is None:
        return f"compute capability {problem.arch / 10} is below 8.0"
    if reason := layout_refusal(problem):
        return reason
    from resnet_fast.dispatch import heuristics
    from resnet_fast.kernels import conv_bn_act as kernel

    if reason := kernel.refusal(problem.spec):
        return reason
    try:
        heuristics.choose(problem.spec, problem.target or INTERPRETED_ARCH)
    except ValueError as error:
        return str(error)
    return None


def _triton_choose(problem: Problem) -> TileConfig:
    from resnet_fast.dispatch import heuristics

    return heuristics.choose(problem.spec, problem.target or INTERPRETED_ARCH)


def _triton_build(problem: Problem, tile: TileConfig | None = None) -> Bind:
    from resnet_fast.kernels import conv_bn_act as kernel

    spec, arch = problem.spec, problem.arch or INTERPRETED_ARCH
    operands = kernel.Operands(problem.x_strides, problem.vector_dtypes, problem.aligned)
    run = kernel.build(spec, tile or _triton_choose(problem), operands, arch=arch)

    def launch(x, residual, inplace, weight, scale, shift, mean, var, eps) -> Tensor:
        y = residual if inplace else new_output(x, spec)
        with on_device_of(x):
            run(x, weight.to(x.dtype), scale, shift, mean, var, eps, residual, y)
        return y

    return lambda *tensors: Direct(launch, *tensors)


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


def _cpu_build(problem: Problem, tile: None = None) -> Bind:
    return cpu.build(problem.spec)


# ---- aten, and what of cuDNN torch offers beside it


def _aten_build(problem: Problem, tile: None = None) -> Bind:
    return _torch_build(aten.conv_bn_act, problem)


def _cudnn_missing() -> str | None:
    return None if torch.backends.cudnn.is_available() else "torch has no cuDNN here"


def _cudnn_refusal(problem: Problem) -> str | None:
    if problem.x == "channels_inner":
        return "x is a slice, which torch would copy before cuDNN"
    return layout_refusal(problem) or aten.cudnn_refusal(problem.spec)


def _cudnn_build(problem: Problem, tile: None = None) -> Bind:
    return _torch_build(aten.cudnn_conv_bn_act, problem)


def _torch_build(function, problem: Problem) -> Bind:
    spec = problem.spec
    geometry = (spec.stride, spec.padding, spec.dilation, spec.groups, spec.activation)

    def launch(x, residual, inplace, weight, scale, shift, mean, var, eps) -> Tensor:
        y = function(x, weight.to(x.dtype), scale, shift, residual, *geometry, mean, var, eps)
        return residual.copy_(y) if inplace else y

    return lambda *tensors: Direct(launch, *tensors)


def _nothing(*_) -> None:
    return None


BACKENDS = (
    Backend("cuda", "cuda", cuda.missing, cuda.refusal, cuda.build, choose=cuda.choose),
    Backend("triton", "cuda", _triton_missing, _triton_refusal, _triton_build,
            choose=_triton_choose),
    Backend("cpu", "cpu", _nothing, _cpu_refusal, _cpu_build),
    Backend("aten", None, _nothing, _nothing, _aten_build),
    Backend("cudnn", "cuda", _cudnn_missing, _cudnn_refusal, _cudnn_build, aten.CUDNN_BY_NAME),
)  # fmt: skip


# ---- add_relu: no spec, no plan; dense tensors of one layout, or aten

ADD_RELU_DTYPES = ("float16", "bfloat16", "float32")


def add_relu(x: Tensor, y: Tensor) -> Tensor:
    """relu(x + y) by the first backend that takes it."""
    dense = x.is_contiguous() or (
        x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )
    if not dense or x.stride() != y.stride() or x.numel() == 0:
        return aten.add_relu(x, y)
    key = str(x.device), str(x.dtype).removeprefix("torch.")
    chosen, _ = explain_add_relu(*key)
    if chosen not in TRIED:
        return cpu.add_relu(x, y) if chosen == "cpu" else aten.add_relu(x, y)
    try:
        return cuda.add_relu(x, y) if chosen == "cuda" else _triton_add_relu(x, y)
    except Exception as error:
        reason = reason_to_pass_on(error)
        _add_relu_failed[(chosen, *key)] = reason
        explain_add_relu.cache_clear()
        text = f"backend {chosen!r} cannot run add_relu, {explain_add_relu(*key)[0]!r} does"
        warnings.warn(f"resnet_fast: {text}: {reason}", stacklevel=2)
    return add_relu(x, y)


_add_relu_failed: dict[tuple[str, str, str], str] = {}  # (backend, device, dtype) -> why


def _triton_add_relu(x: Tensor, y: Tensor) -> Tensor:
    from resnet_fast.kernels import add_relu as kernel

    out = torch.empty_like(x)
    with on_device_of(x):
        _add_relu_launch(x.numel(), x.dtype, kernel.is_aligned(x, y, out), x.device)(x, y, out)
    return out


@functools.lru_cache(maxsize=1024)
def _add_relu_launch(numel: int, dtype: torch.dtype, aligned: bool, device: torch.device):
    from resnet_fast.kernels import add_relu as kernel

    arch = _hardware.capability_of(device) if device.type == "cuda" else INTERPRETED_ARCH
    return kernel.build(numel, dtype, aligned, arch=arch)


@functools.cache
def explain_add_relu(device: str, dtype: str) -> tuple[str, dict[str, str]]:
    """The first backend that takes dense tensors of a dtype, and for each other why not.

    `device` is as torch prints it: of several GPUs, each may be of another architecture.
    """
    kind, known = torch.device(device).type, dtype in ADD_RELU_DTYPES
    reasons = {}
    for row in BACKENDS:
        reason = None
        if row.device not in (None, kind):
            reason = f"runs on {row.device} tensors, not {kind}"
        elif row.by_name:
            reason = f"{row.name} has no such function"
        elif row.name != "aten":
            reason = cuda.add_relu_missing(device) if row.name == "cuda" else row.missing()
            reason = reason or _add_relu_failed.get((row.name, device, dtype))
            reason = reason or (None if known else f"takes {ADD_RELU_DTYPES}, not {dtype}")
        reasons[row.name] = reason
    return _first(reasons, {})


def _first(reasons: dict[str, str | None], whys: dict[str, str]) -> tuple[str, dict[str, str]]:
    chosen = next(name for name, reason in reasons.items() if reason is None)
    first = f"{chosen} comes first" + (f": {whys[chosen]}" if whys.get(chosen) else "")
    others = {name: reason for name, reason in reasons.items() if name != chosen}
    return chosen, {name: why or first for name, why in others.items()}
