# SPDX-License-Identifier: Apache-2.0
"""Which classes of which libraries are understood: a forward function, and the recipe of its parts.

A class is known by its `forward`, not by its name or ancestry: a subclass that overrides forward
computes something else and is left alone. Libraries are looked up among the modules that are
already imported (a model of theirs could not exist otherwise), so nothing is imported here.
"""

from __future__ import annotations

import sys

from torch import nn

from resnet_fast.conversion.forward import class_of, is_converted
from resnet_fast.nn.blocks import BASIC_BLOCK, BOTTLENECK, Recipe

_TIMM_EXTRAS = ("drop_block", "aa", "se", "drop_path")

# (module, class) -> recipe
BLOCKS: dict[tuple[str, str], Recipe] = {
    ("torchvision.models.resnet", "BasicBlock"): BASIC_BLOCK,
    ("torchvision.models.resnet", "Bottleneck"): BOTTLENECK,
    ("timm.models.resnet", "BasicBlock"): Recipe(
        BASIC_BLOCK.units, activations=("act1", "act2"), absent=_TIMM_EXTRAS
    ),
    ("timm.models.resnet", "Bottleneck"): Recipe(
        BOTTLENECK.units, activations=("act1", "act2", "act3"), absent=_TIMM_EXTRAS
    ),
}


def recipe_for(block: nn.Module) -> Recipe | None:
    """The recipe of a block of a known class, or None."""
    for (module, name), recipe in BLOCKS.items():
        known = getattr(sys.modules.get(module), name, None)
        if known is not None and _forward_of(block) is known.forward:
            return recipe
    return None


def awaits_optimize(block: nn.Module) -> bool:
    """Whether `optimize` would let this block run fused, and has not been asked to yet."""
    if is_converted(block) or "forward" in block.__dict__:
        return False
    return recipe_for(block) is not None


def _forward_of(module: nn.Module) -> object:
    """The forward of the module's class, the one before any conversion; scripted ones have none."""
    return getattr(class_of(module), "forward", None)


def is_torchvision_resnet(model: nn.Module) -> bool:
    """Whether the model runs torchvision's own ResNet forward, so that its stem can be fused."""
    return _is_resnet_of("torchvision.models.resnet", model)


def is_own_resnet(model: nn.Module) -> bool:
    """Whether the model runs the forward of this package's ResNet."""
    return _is_resnet_of("resnet_fast.models.resnet", model)


def _is_resnet_of(library: str, model: nn.Module) -> bool:
    known = getattr(sys.modules.get(library), "ResNet", None)
    return known is not None and all(
        getattr(class_of(model), name, None) is getattr(known, name)
        for name in ("forward", "_forward_impl")
    )


def resembles_block(module: nn.Module) -> bool:
    """Whether the module has a residual block's parts but a forward that is not known."""
    children = {name for name, _ in module.named_children()}
    return {"conv1", "bn1", "conv2", "bn2"} <= children and hasattr(module, "downsample")
