# SPDX-License-Identifier: Apache-2.0
"""How a module that exists comes to run fused: its class becomes a subclass with another forward.

The subclass is made once per class and role, has its name, and differs in one method alone; the
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
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import Tensor, nn

from resnet_fast.nn import forward, reasons
from resnet_fast.nn.recipes import Family, Recipe, is_sequence, stem_of


@dataclass(frozen=True)
class Method:
    """A method of a network that runs the parts of a family.

    Args:
        method: its name.
        family: the names of the network's parts.
        inner: a method that it does nothing but call; "" for none.
    """

    method: str
    family: Family
    inner: str = ""

    def stem(self, _module: nn.Module) -> Recipe:
        """The recipe of the convolutions that run first."""
        return self.family.stem


def _second(_first: object, second: object) -> object:
    return second


@dataclass(frozen=True)
class Taps:
    """A method that calls children one after the other and collects results by the way.

    Args:
        method: its name.
        children: (module) -> the names of the children in order, and of each the key under which
            its result is collected, or None.
        collect: (module, a child's result) -> what is collected of it.
        result: (x, {key: result}) -> what the method returns.
    """

    method: str
    children: Callable[[nn.Module], Iterator[tuple[str, object]]]
    collect: Callable[[nn.Module, object], object] = _second
    result: Callable[[Tensor, OrderedDict], object] = _second

    def stem(self, module: nn.Module) -> Recipe:
        """The recipe of the children that run first: convolutions, norms and activations."""
        names = []
        for name, key in self.children(module):
            child = module._modules.get(name)
            if not (
                type(child) is nn.Conv2d
                or reasons.is_like_norm(child)
                or reasons.is_like_activation(child)
                or is_sequence(child)
            ):
                break
            names.append(name)
            if key is not None:
                break
        return Recipe(tuple(names))


@dataclass(frozen=True)
class Role:
    """What a converted module is.

    Args:
        kind: "block", a residual block or a convolution with its norm; "sequence", an nn.Sequential
            that holds such; "stage", an nn.Sequential of blocks; "network" or "taps", a model of
            which one method is known.
        recipe: the block's or the sequence's parts.
        backend: see `ops.conv_bn_act`.
        known: the method of a network or of taps.
    """

    kind: str
    recipe: Recipe | None = None
    backend: str = "auto"
    known: Method | Taps | None = None

    @property
    def method(self) -> str:
        """The name of the method that is replaced."""
        return "forward" if self.known is None else self.known.method


def convert(module: nn.Module, role: Role) -> None:
    """Let `module` run fused, unless it does already or its instance has a method of its own."""
    if not is_converted(module) and role.method not in module.__dict__:
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
    method = getattr(plain, role.method)
    namespace = {
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
        "__doc__": plain.__doc__,
        "__reduce_ex__": _reduce,
        "_role": role,
        role.method: _shown_as(method, _RUN[role.kind](method, role)),
    }
    if role.recipe is not None:
        namespace["recipe"] = role.recipe
        namespace["backend"] = role.backend
        namespace["_forward_plain"] = getattr(plain, "_forward_plain", method)
    if role.kind in ("sequence", "stage"):
        namespace["runs_chain"] = True
    if role.kind == "network" and role.method == "forward":
        namespace["family"] = role.known.family
    return type(plain)(plain.__name__, (plain,), namespace)


def _run_block(plain: Callable, role: Role) -> Callable[[nn.Module, Tensor], Tensor]:
    return forward.block_forward


def _run_stage(plain: Callable, role: Role) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(stage: nn.Sequential, x: Tensor) -> Tensor:
        return plain(stage, x) if reasons.is_symbolic(x) else forward.stage_forward(stage, x)

    return run


def _checkpoints(module: nn.Module) -> bool:
    """Whether timm computes activations again in the backward pass."""
    return getattr(module, "grad_checkpointing", False) and torch.is_grad_enabled()


def _run_network(plain: Callable, role: Role) -> Callable[[nn.Module, Tensor], Tensor]:
    family, inner = role.known.family, role.known.inner

    def run(model: nn.Module, x: Tensor) -> Tensor:
        if reasons.is_symbolic(x) or inner in model.__dict__ or _checkpoints(model):
            return plain(model, x)
        return forward.network_forward(model, x, family, role.backend)

    return run


def _run_taps(plain: Callable, role: Role) -> Callable[[nn.Module, Tensor], object]:
    taps = role.known

    def run(module: nn.Module, x: Tensor) -> object:
        recipe = taps.stem(module)
        stem = recipe.main
        if _checkpoints(module) or not stem or reasons.is_symbolic(x):
            return plain(module, x)
        y = forward.stem_forward(module, x, stem_of(recipe, role.backend))
        out = OrderedDict()
        for name, key in taps.children(module):
            if name in stem[:-1]:
                continue
            if name != stem[-1]:
                y = module._modules[name](y)
            if key is not None:
                out[key] = taps.collect(module, y)
        return taps.result(x, out)

    return run


_RUN = {
    "block": _run_block,
    "sequence": _run_block,
    "stage": _run_stage,
    "network": _run_network,
    "taps": _run_taps,
}


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
    # Others may have made a subclass of it since, as fully_shard does.
    converted = next(kind for kind in type(self).__mro__ if "_role" in kind.__dict__)
    make, arguments, *rest = super(converted, self).__reduce_ex__(protocol)
    if make is copyreg.__newobj__ and arguments[0] is converted:
        make, arguments = _new, (converted.__base__, converted._role, *arguments[1:])
    return make, arguments, *rest


def _new(plain: type[nn.Module], role: Role, *arguments) -> nn.Module:
    kind = _converted_class(plain, role)
    return kind.__new__(kind, *arguments)
