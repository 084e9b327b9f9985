# SPDX-License-Identifier: Apache-2.0
"""How a module that exists comes to run fused: its class becomes a subclass with another forward.

The subclass is made once per class and role, has its name, and differs in `forward` alone; the
instance keeps its attributes, children, parameters and hooks. So copies, DataParallel's replicas
and pickles are as right as the module itself, and nothing refers back to it. torch's own
`parametrize` and `fully_shard` convert modules the same way.

torch.fx, torch.export and torch.jit.script read a forward's signature, globals and source: those of
the class's own are shown to them, so that a converted model scripts as it did before.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

from torch import Tensor, nn

from resnet_fast.nn import blocks, fusion
from resnet_fast.nn.blocks import Recipe


@dataclass(frozen=True)
class Role:
    """What a converted module is.

    Args:
        kind: "block", a residual block; "stage", an nn.Sequential of them; or "model", a ResNet
            with torchvision's children: conv1, bn1, relu, maxpool, layer1 to 4, avgpool, fc.
        recipe: the block's parts.
        backend: see `ops.conv_bn_act`.
    """

    kind: str
    recipe: Recipe | None = None
    backend: str = "auto"


def convert(module: nn.Module, role: Role) -> None:
    """Let `module` run fused, unless it does already or its instance has a forward of its own."""
    if not is_converted(module) and "forward" not in module.__dict__:
        module.__class__ = _converted_class(type(module), role)


def revert(module: nn.Module) -> None:
    """Give a converted module its class back; others are left alone."""
    if is_converted(module):
        module.__class__ = type(module).__base__


def is_converted(module: nn.Module) -> bool:
    """Whether `convert` has changed this module's class."""
    return "_role" in type(module).__dict__


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class, or the one it had before `convert`."""
    return type(module).__base__ if is_converted(module) else type(module)


@functools.cache
def _converted_class(plain: type[nn.Module], role: Role) -> type[nn.Module]:
    forward = plain.forward
    namespace = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__reduce_ex__": _reduce,
        "_role": role,
        "forward": _shown_as(forward, _RUN[role.kind](forward, role)),
    }
    if role.kind == "block":
        namespace["recipe"] = role.recipe
        namespace["backend"] = role.backend
        namespace["_forward_plain"] = getattr(plain, "_forward_plain", forward)
    elif role.kind == "stage":
        namespace["runs_chain"] = True
    else:
        namespace["fuses_stem"] = True
    return type(plain)(plain.__name__, (plain,), namespace)


def _run_block(plain: Callable, role: Role) -> Callable[[nn.Module, Tensor], Tensor]:
    return blocks.block_forward


def _run_stage(plain: Callable, role: Role) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(stage: nn.Sequential, x: Tensor) -> Tensor:
        return plain(stage, x) if fusion.is_symbolic(x) else blocks.stage_forward(stage, x)

    return run


def _run_model(plain: Callable, role: Role) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        if fusion.is_symbolic(x) or "_forward_impl" in model.__dict__:
            return plain(model, x)
        return blocks.resnet_forward(model, x, role.backend)

    return run


_RUN = {"block": _run_block, "stage": _run_stage, "model": _run_model}


def _shown_as(plain: Callable, run: Callable[[nn.Module, Tensor], Tensor]) -> FunctionType:
    """A method that calls `run` and looks like `plain`: name, signature, source and globals."""
    bind = inspect.signature(plain).bind

    def forward(self, *args, **kwargs):
        if kwargs:
            args = bind(self, *args, **kwargs).args[1:]
        return run(self, *args)

    # torch.jit resolves the names in a function's source through its globals.
    shown = FunctionType(forward.__code__, plain.__globals__, closure=forward.__closure__)
    return functools.update_wrapper(shown, plain)


def _reduce(self: nn.Module, protocol: int) -> tuple:
    """As the class before would, but for the class, which pickle could not find by its name."""
    make, arguments, *rest = super(type(self), self).__reduce_ex__(protocol)
    if make is copyreg.__newobj__ and arguments[0] is type(self):
        make, arguments = _new, (class_of(self), type(self)._role, *arguments[1:])
    return make, arguments, *rest


def _new(plain: type[nn.Module], role: Role, *arguments) -> nn.Module:
    kind = _converted_class(plain, role)
    return kind.__new__(kind, *arguments)
