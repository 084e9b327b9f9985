# SPDX-License-Identifier: Apache-2.0
"""What `optimize` puts in place of a module's forward, and takes away again.

The module keeps its class, children, parameters and hooks; only `module.forward`, an attribute of
that one instance, becomes a `FusedForward`. It survives copy.deepcopy and pickle with its module.
torch.export sees in it the class's own forward; torch.jit.script does not take it: `restore` first.
"""

from __future__ import annotations

from types import MethodType

from torch import Tensor, nn

from resnet_fast.nn import blocks, fusion
from resnet_fast.nn.blocks import Recipe

_OF_FUNCTIONS = ("__closure__", "__code__", "__defaults__", "__globals__", "__kwdefaults__")


class FusedForward:
    """A forward that fuses where it may, and else calls the class's own.

    Args:
        module: the module whose forward this is.
        recipe: the parts of a residual block; None for a stage or a whole model.
        backend: see `ops.conv_bn_act`.
    """

    def __init__(self, module: nn.Module, recipe: Recipe | None = None, backend: str = "auto"):
        self.module = module
        self.recipe = recipe
        self.backend = backend

    @property
    def __wrapped__(self) -> MethodType:
        """The class's own forward, bound."""
        return MethodType(type(self.module).forward, self.module)

    def __getattr__(self, name: str) -> object:
        """What torch.export looks up in a function: the class's own forward's."""
        if name not in _OF_FUNCTIONS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(type(self.module).forward, name)

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class BlockForward(FusedForward):
    """A residual block of a known class."""

    def __call__(self, x: Tensor) -> Tensor:
        return blocks.block_forward(self.module, x)


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
    if "forward" not in forward.module.__dict__:
        forward.module.forward = forward


def remove(module: nn.Module) -> bool:
    """Give the module its class's forward back; whether there was anything to remove."""
    if not isinstance(module.__dict__.get("forward"), FusedForward):
        return False
    del module.forward
    return True
