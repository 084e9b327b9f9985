# SPDX-License-Identifier: Apache-2.0
"""Why something may not run fused, in words that `report` prints; None where it may.

Modules stay what and where they are; only the *call* is fused, after every condition under which
the fused call could differ from the plain one has been looked at, in each call anew:
- hooks, parametrizations, subclasses: something of the user's would be bypassed;
- BatchNorm in training mode or without running statistics, GroupNorm: another computation;
- a gradient is needed: the ops compute theirs anew, which plain modules need not;
- fx tracing, scripting, torch.jit.trace, torch.func: tools that need the plain graph (exporters
  that trace otherwise, as to ONNX, are for `disabled()`).
"""

from __future__ import annotations

import threading
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from resnet_fast import _env
from resnet_fast.nn.units import Unit


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


HOOKED = "a hook is registered on it, or it is compiled"


def call_refusal(module: nn.Module) -> str | None:
    """Why `module` has to be called: more would run than its class's forward; None if not."""
    if has_hooks(module):
        return HOOKED
    return "its forward was replaced" if "forward" in module.__dict__ else None


def is_torchs_own(module: object) -> bool:
    """Whether calling it runs torch's code alone, which changes nothing but its result."""
    if not isinstance(module, nn.Module):
        return True  # a function of this package's, or None
    torchs = type(module).__module__.startswith("torch.nn.modules.") and not module._modules
    return torchs and call_refusal(module) is None


def unit_refusal(conv: nn.Module | None, norm: nn.Module | None) -> str | None:
    """Why conv and norm are not modules that could ever run as a unit; None if they are."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not a plain Conv2d"
    if norm is None or not is_like_norm(norm):
        return "no BatchNorm2d follows it"
    if _stores_of(norm) is None:
        return f"{type(norm).__name__} is not a BatchNorm2d"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding is {conv.padding_mode} {conv.padding}"
    vectors = norm_vectors(norm)
    return vectors if isinstance(vectors, str) else None


def unit_of(conv: nn.Module | None, norm: nn.Module | None, x: Tensor) -> Unit | str:
    """conv and norm as a `Unit` that may run fused on a tensor like `x`, or why they may not."""
    reason = unit_refusal(conv, norm) or call_refusal(conv) or call_refusal(norm)
    if reason is not None:
        return reason
    if norm.training and not _is_frozen(norm):
        return "BatchNorm is in training mode"
    weight, bias = conv._parameters.get("weight"), conv._parameters.get("bias")
    if weight is None or (bias is None and conv.bias is not None):
        return "the convolution's weight is computed (pruned or parametrized)"
    for name in ("stride", "padding", "dilation"):
        value = getattr(conv, name)
        if type(value) is not tuple or len(value) != 2:  # a list could change unseen
            return f"{name} is {value}, not a pair"
    unit = Unit(conv, weight, *norm_vectors(norm), getattr(norm, "eps", FROZEN_EPS), bias)
    return _tensors_refusal(unit, x) or unit


# transformers' DetrFrozenBatchNorm2d and its copies have theirs in the code of `forward`.
FROZEN_EPS = 1e-5
# Where all classes of that name compute what torchvision's does.
_FROZEN_IN = ("torchvision.ops.misc", "transformers.models.")


def _is_frozen(norm: nn.Module) -> bool:
    """Whether it is a BatchNorm of buffers, which has no training mode."""
    kind = type(norm)
    return kind.__name__.endswith("FrozenBatchNorm2d") and kind.__module__.startswith(_FROZEN_IN)


def is_norm_with_activation(norm: nn.Module) -> bool:
    """Whether it is timm's BatchNorm2d that calls its children `drop` and `act` on the result."""
    kind = type(norm)
    return kind.__name__ == "BatchNormAct2d" and kind.__module__ == "timm.layers.norm_act"


def runs_inside(norm: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that a norm calls on its result."""
    return [(n, norm._modules[n]) for n in ("drop", "act")] if is_norm_with_activation(norm) else []


def _stores_of(norm: nn.Module | None) -> tuple[dict, dict] | None:
    """Where an affine norm keeps weight and bias, and its statistics; None if it is another."""
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm) or is_norm_with_activation(norm):
        return norm._parameters, norm._buffers
    return (norm._buffers, norm._buffers) if _is_frozen(norm) else None


def is_plain_norm(module: nn.Module) -> bool:
    """Whether it is a BatchNorm of a kind that may run inside of an op."""
    return _stores_of(module) is not None


def norm_vectors(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor] | str:
    """(weight, bias, running_mean, running_var) of an affine norm, or why it is not one."""
    affine, buffers = _stores_of(norm)
    vectors = (
        affine.get("weight"),
        affine.get("bias"),
        buffers.get("running_mean"),
        buffers.get("running_var"),
    )
    if any(v is None for v in vectors):
        return "BatchNorm has no running statistics or no weight"
    return vectors


def is_like_norm(module: nn.Module) -> bool:
    """Whether it is some normalization."""
    return "norm" in type(module).__name__.lower()


def is_like_activation(module: nn.Module) -> bool:
    """Whether it is an activation function as a module."""
    kind = type(module)
    place = kind.__module__
    return "activation" in place or any(k is nn.ReLU for k in kind.__mro__)


def _tensors_refusal(unit: Unit, x: Tensor) -> str | None:
    weight, vectors = unit.weight, unit.tensors[1:]
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    if not autocast and weight.dtype != x.dtype:
        return f"x is {x.dtype}, the weight {weight.dtype}"
    if any(v.dtype not in (torch.float32, dtype) for v in vectors):
        return f"BatchNorm is {vectors[0].dtype} beside {dtype}"
    if weight.device != x.device:
        return f"x is on {x.device}, the weight on {weight.device}"
    for tensor in unit.tensors:
        if type(tensor) not in _TENSOR_TYPES and not _is_traced(tensor):
            return f"a weight is a {type(tensor).__name__}"
    if torch.is_grad_enabled() and (
        x.requires_grad or any(tensor.requires_grad for tensor in unit.tensors)
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
