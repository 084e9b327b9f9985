# SPDX-License-Identifier: Apache-2.0
"""When a conv, its BatchNorm and its ReLU may run as one op: the guard list, and the fused call.

Modules stay what and where they are; only the *call* is fused, after every condition under which
the fused call could differ from the plain one has been looked at, in each call anew:
- hooks, parametrizations, subclasses: something of the user's would be bypassed;
- BatchNorm in training mode or without running statistics, GroupNorm: another computation;
- a gradient is needed: the ops compute theirs anew, which plain modules need not;
- fx tracing, scripting, torch.jit.trace, torch.func: tools that need the plain graph (exporters
  that trace otherwise, as to ONNX, are for `disabled()`).
A guard returns the reason in words, which `report` prints.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from resnet_fast import _env, ops


class Unit(NamedTuple):
    """A convolution and the BatchNorm that follows it, found fit to run as one op."""

    conv: nn.Conv2d
    weight: Tensor  # [K, R, S, C / groups]
    scale: Tensor  # [K]
    shift: Tensor  # [K]
    mean: Tensor  # [K]
    var: Tensor  # [K]
    eps: float

    @property
    def channels(self) -> int:
        """Channels of the input."""
        return self.weight.shape[1] * self.conv.groups


@dataclass(slots=True)
class Record:
    """How a block or a stem has run so far, for `report`."""

    fused: int = 0
    plain: int = 0
    backends: dict[str, str] = field(default_factory=dict)  # name -> why no fused kernel took it
    reason: str | None = None
    merged: str = ""  # the op that ran several units as one kernel, if one did
    programs: dict[tuple, Any] = field(default_factory=dict)  # see program.py

    def count_fused(self) -> None:
        """One more call ran fused: what spoke against it before does no longer."""
        self.fused += 1
        self.reason = None

    def note(self, plan) -> None:
        """Remember the backend of an op's `Plan`, and why a better one refused if any did."""
        if plan.backend not in self.backends:
            self.backends[plan.backend] = plan.why_fallback()


class _Switch:
    """How many `disabled()` blocks are open; an attribute, so that torch.compile guards on it."""

    def __init__(self) -> None:
        self.off = 0  # the instance's from the start: torch.compile guards on where it is found
        self.lock = threading.Lock()

    def add(self, count: int) -> None:
        with self.lock:
            self.off += count


_switch = _Switch()
_disabled_by_environment = _env.disabled()

# What a fused call stands for, as torch has it: whoever replaces one of them wants it called.
_Conv2d, _BatchNorm2d, _ReLU, _functional = nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.functional
_conv_forward, _norm_forward, _relu_forward = _Conv2d.forward, _BatchNorm2d.forward, _ReLU.forward
_batch_norm = _functional.batch_norm


@contextmanager
def disabled():
    """Every model takes its plain path while this context is open.

    For exporters that do not know the fused ops (ONNX, TensorRT, OpenVINO), and to compare.

    Example:
        >>> with resnet_fast.disabled():
        ...     expected = model(x)
    """
    _switch.add(1)
    try:
        yield
    finally:
        _switch.add(-1)


def context_refusal(x: Tensor) -> str | None:
    """Why nothing may be fused in a call on `x`, whatever the modules; None if it may."""
    if _disabled_by_environment:
        return "RESNET_FAST_DISABLE is set"
    if not isinstance(x, Tensor):
        return "traced by torch.fx"
    if x.dim() != 4:
        return "x is not 4-D"
    if torch.jit.is_tracing():
        return "traced by torch.jit.trace"
    if _switch.off:
        return "inside resnet_fast.disabled()"
    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform"
    if nn_module._has_any_global_hook():
        return "a global module hook is registered"
    if (
        _Conv2d.forward is not _conv_forward
        or _BatchNorm2d.forward is not _norm_forward
        or _functional.batch_norm is not _batch_norm
        or _ReLU.forward is not _relu_forward
    ):
        return "torch's convolution, BatchNorm or ReLU was replaced"
    if type(x) not in _TENSOR_TYPES and not _is_traced(x):
        return f"x is a {type(x).__name__}"
    if x.device.type not in ("cpu", "cuda"):
        return f"x is on the {x.device.type} device"
    if forward_ad._current_level >= 0:
        return "inside torch.autograd.forward_ad"  # which no_grad() does not switch off
    return None


_TENSOR_TYPES = (Tensor, nn.Parameter)


def _is_traced(x: Tensor) -> bool:
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(x, (FakeTensor, FunctionalTensor))


def is_symbolic(x) -> bool:
    """Whether x stands for a tensor in a torch.fx trace, which must see the plain modules."""
    return not isinstance(x, Tensor)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` would run anything beside its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None  # module.compile()
        or nn_module._has_any_global_hook()
    )


def call_refusal(module: nn.Module) -> str | None:
    """Why `module` has to be called: more would run than its class's forward; None if not."""
    if has_hooks(module):
        return "a hook is registered on it, or it is compiled"
    return "its forward was replaced" if "forward" in module.__dict__ else None


def unit_of(conv: nn.Module | None, norm: nn.Module | None, x: Tensor) -> Unit | str:
    """conv and norm as a `Unit` that may run fused on a tensor like `x`, or why they may not."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not a plain Conv2d"
    vectors = norm_vectors(norm)
    if isinstance(vectors, str):
        return vectors
    reason = call_refusal(conv) or call_refusal(norm)
    if reason is not None:
        return reason
    parameters = conv._parameters
    weight = parameters.get("weight")
    if weight is None:
        return "the convolution's weight is computed (pruned or parametrized)"
    if parameters.get("bias") is not None:
        return "the convolution has a bias of its own"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding is {conv.padding_mode} {conv.padding}"
    for name in ("stride", "padding", "dilation"):
        value = getattr(conv, name)
        if type(value) is not tuple or len(value) != 2:  # a list could change unseen
            return f"{name} is {value}, not a pair"
    return _tensors_refusal(weight, vectors, x) or Unit(conv, weight, *vectors, norm.eps)


def norm_vectors(norm: nn.Module | None) -> tuple[Tensor, Tensor, Tensor, Tensor] | str:
    """(weight, bias, running_mean, running_var) of an affine norm, or why it is not one."""
    kind = type(norm)
    if kind is nn.BatchNorm2d or kind is nn.SyncBatchNorm:
        if norm.training:
            return "BatchNorm is in training mode"
        affine, buffers = norm._parameters, norm._buffers
    elif kind.__name__ == "FrozenBatchNorm2d" and kind.__module__ == "torchvision.ops.misc":
        affine = buffers = norm._buffers
    else:
        return f"{kind.__name__} is not a BatchNorm2d"
    vectors = (
        affine.get("weight"),
        affine.get("bias"),
        buffers.get("running_mean"),
        buffers.get("running_var"),
    )
    if any(v is None for v in vectors):
        return "BatchNorm has no running statistics or no weight"
    return vectors


def _tensors_refusal(weight: Tensor, vectors: tuple[Tensor, ...], x: Tensor) -> str | None:
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if not autocast and weight.dtype != x.dtype:
        return f"x is {x.dtype}, the weight {weight.dtype}"
    if any(v.dtype not in (torch.float32, dtype) for v in vectors):
        return f"BatchNorm is {vectors[0].dtype} beside {dtype}"
    if weight.device != x.device:
        return f"x is on {x.device}, the weight on {weight.device}"
    for tensor in (weight, *vectors):
        if type(tensor) not in _TENSOR_TYPES and not _is_traced(tensor):
            return f"a weight is a {type(tensor).__name__}"
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or any(v.requires_grad for v in vectors)
    ):
        return "a gradient is needed; for inference use torch.inference_mode() or no_grad()"
    return None


def listened_to(x: Tensor) -> bool:
    """Whether something in torch's dispatcher wants to see the ops called on x.

    If not, they are called without it, which saves 8 to 14 microseconds of each (15 arguments, 53
    times in a ResNet-50); gradients and torch.func are excluded before this is asked.
    """
    return bool(
        torch.compiler.is_compiling()
        or type(x) not in _TENSOR_TYPES
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.autograd._profiler_enabled()
        or torch.is_autocast_enabled(x.device.type)
    )


def activation_refusal(activation: nn.Module) -> str | None:
    """Why the activation may not run inside the op; None if it is a ReLU and nothing else."""
    if type(activation) is not nn.ReLU:
        return f"{type(activation).__name__} is not a ReLU"
    return call_refusal(activation)


def call_of(
    unit: Unit,
    x: Tensor,  # [N, H, W, C]
    residual: Tensor | None,  # [N, P, Q, K]
    activation: str,
    backend: str,
) -> ops.Call:
    """The op's arguments for a unit.

    Args:
        unit: the convolution and its norm.
        x: channels_last.
        residual: added before the activation.
        activation: "relu" or "none".
        backend: see `ops.conv_bn_act`.
    """
    conv, weight, scale, shift, mean, var, eps = unit
    return ops.Call(
        x, weight, scale, shift, residual, conv.stride, conv.padding, conv.dilation, conv.groups,
        activation, mean, var, eps, backend,
    )  # fmt: skip


def join_call(
    main: Unit,
    projection: Unit,
    h: Tensor,  # [N, P, Q, C]
    x: Tensor,  # [N, H, W, D]
    backend: str,
) -> ops.JoinCall:
    """The arguments of `ops.conv_bn_join` for a block's last unit and its projection."""
    _, weight, scale, shift, mean, var, eps = main
    conv, proj_weight, proj_scale, proj_shift, proj_mean, proj_var, proj_eps = projection
    return ops.JoinCall(
        h, weight, scale, shift, x, proj_weight, proj_scale, proj_shift, conv.stride,
        mean, var, eps, proj_mean, proj_var, proj_eps, backend,
    )  # fmt: skip


def join_refusal(main: Unit, projection: Unit) -> str | None:
    """Why the two convolutions are none that `ops.conv_bn_join` takes, or None."""
    for name, conv in (("convolution", main.conv), ("projection", projection.conv)):
        if conv.groups != 1 or conv.dilation != (1, 1):
            return f"the {name} has groups or a dilation"
    height, width = main.weight.shape[2:]
    if not height % 2 == width % 2 == 1 or main.conv.padding != (height // 2, width // 2):
        return "the convolution changes the map's size"
    if main.conv.stride != (1, 1):
        return "the convolution has a stride"
    if projection.weight.shape[2:] != (1, 1) or projection.conv.padding != (0, 0):
        return "the projection is not pointwise"
    return None


def to_channels_last(x: Tensor) -> Tensor:
    """x in the layout the kernels take: the one conversion, at the boundary of a model or block."""
    return x.contiguous(memory_format=torch.channels_last)
