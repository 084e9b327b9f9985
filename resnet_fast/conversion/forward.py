# SPDX-License-Identifier: Apache-2.0
"""What `optimize` puts in place of a module's forward, and takes away again.

The module keeps its class, children, parameters and hooks; only `module.forward`, an attribute of
that one instance, becomes a `FusedForward`. It survives copy.deepcopy and pickle with its module.
torch.export sees in it the class's own forward; torch.jit.script does not take it: `restore` first.
"""

from __future__ import annotations

from collections import OrderedDict
from types import MethodType

import torch
from torch import Tensor, nn

from resnet_fast.conversion.recipes import Method, Taps
from resnet_fast.nn import blocks, fusion
from resnet_fast.nn.parts import Fusable, Recipe

_OF_FUNCTIONS = ("__closure__", "__code__", "__defaults__", "__globals__", "__kwdefaults__")


class FusedForward:
    """A forward that fuses where it may, and else calls the class's own.

    Args:
        module: the module whose forward this is.
        recipe: of all that the module's forward does; None for a stage or a whole model.
        backend: see `ops.conv_bn_act`.
        method: what it stands for: forward, or a method that the class's forward calls.
    """

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe | None = None,
        backend: str = "auto",
        method: str = "forward",
    ):
        self.module = module
        self.recipe = recipe
        self.backend = backend
        self.method = method

    @property
    def __wrapped__(self) -> MethodType:
        """The class's own forward, bound."""
        return MethodType(getattr(type(self.module), self.method), self.module)

    def __getattr__(self, name: str) -> object:
        """What torch.export looks up in a function: the class's own forward's."""
        if name not in _OF_FUNCTIONS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(getattr(type(self.module), self.method), name)

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class BlockForward(FusedForward):
    """A residual block of a known class, or a convolution with its norm."""

    def __call__(self, x: Tensor) -> Tensor:
        return blocks.block_forward(self.module, x)


class SequenceForward(BlockForward):
    """An nn.Sequential that holds convolutions and their norms."""

    runs_chain = True

    def __call__(self, input: Tensor) -> Tensor:
        return blocks.block_forward(self.module, input)


class StemForward(FusedForward):
    """A method that runs a model's stem, and perhaps what comes after it."""

    def __init__(self, module: nn.Module, known: Method, backend: str):
        super().__init__(module, None, backend, known.method)
        self.known = known

    def __call__(self, x: Tensor) -> Tensor:
        plain = getattr(type(self.module), self.method)
        found = Fusable(self.known.stem(self.module), self.backend, plain)
        return blocks.stem_of_forward(self.module, x, found)


class TapsForward(FusedForward):
    """A method that calls a module's children in turn, the stem's as one; see `recipes.Taps`."""

    def __init__(self, module: nn.Module, taps: Taps, backend: str):
        super().__init__(module, None, backend, taps.method)
        self.taps = taps

    def __call__(self, x: Tensor) -> object:
        module, taps = self.module, self.taps
        again = getattr(module, "grad_checkpointing", False) and torch.is_grad_enabled()
        stem = taps.stem(module)
        if again or not stem.main or fusion.is_symbolic(x):
            return self.__wrapped__(x)
        y = blocks.stem_of_forward(module, x, Fusable(stem, self.backend, self._call_stem))
        out = OrderedDict()
        for name, key in taps.children(module):
            if name in stem.main[:-1]:
                continue
            if name != stem.main[-1]:
                y = module._modules[name](y)
            if key is not None:
                out[key] = taps.collect(module, y)
        return taps.result(x, out)

    def _call_stem(self, module: nn.Module, x: Tensor) -> Tensor:
        for name in self.taps.stem(module).main:
            x = module._modules[name](x)
        return x


class StageForward(FusedForward):
    """An nn.Sequential of residual blocks."""

    runs_chain = True

    def __call__(self, input: Tensor) -> Tensor:
        if fusion.is_symbolic(input):
            return self.__wrapped__(input)
        return blocks.stage_forward(self.module, input)


class ModelForward(FusedForward):
    """A ResNet with torchvision's children: conv1, bn1, relu, maxpool, layer1 to 4, avgpool, fc."""

    fuses_stem = True

    def __call__(self, x: Tensor) -> Tensor:
        if fusion.is_symbolic(x) or "_forward_impl" in self.module.__dict__:
            return self.__wrapped__(x)
        return blocks.resnet_forward(self.module, x, self.backend)


def install(forward: FusedForward) -> None:
    """Make `forward` its module's, unless that instance has one of its own: ours or a user's."""
    if forward.method not in forward.module.__dict__:
        setattr(forward.module, forward.method, forward)


def remove(module: nn.Module) -> bool:
    """Give the module its class's methods back; whether there was anything to remove."""
    ours = [name for name, v in module.__dict__.items() if isinstance(v, FusedForward)]
    for name in ours:
        delattr(module, name)
    return bool(ours)
