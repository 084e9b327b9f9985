# SPDX-License-Identifier: Apache-2.0
"""Which classes of which libraries are understood: a forward function, and the recipe of its parts.

A class is known by its `forward`, not by its name or ancestry: a subclass that overrides forward
computes something else and is left alone. Libraries are looked up among the modules that are
already imported (a model of theirs could not exist otherwise), so nothing is imported here.

Sequences need no entry: whatever runs `nn.Sequential.forward` is understood by its children.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from resnet_fast.conversion.forward import Method, Taps, class_of
from resnet_fast.nn.recipes import (
    BASIC_BLOCK,
    BOTTLENECK,
    RESNET,
    SEQUENCE,
    STAGES,
    STEM,
    Family,
    Recipe,
    is_sequence,
    recipe_of,
    residual,
)

_CONV_BN_RELU = Recipe(("conv", "bn", "relu"))
_CLIP_STEM = Recipe(
    ("conv1", "bn1", "act1", "conv2", "bn2", "act2", "conv3", "bn3", "act3"),
)
_BYOB_END = ("attn_last", "drop_path")


def _transformers(prefix: str) -> dict[str, Recipe]:
    """Of transformers: a block's convolutions are layers of their own in its child `layer`."""
    names = ("convolution", "normalization", "activation")
    block = residual("layer", shortcut="shortcut", activation="activation")
    known = {"ConvLayer": Recipe(names), "ShortCut": Recipe(names[:2])}
    known |= dict.fromkeys(("BasicLayer", "BottleNeckLayer", "XLayer", "YLayer"), block)
    return {prefix + name: recipe for name, recipe in known.items()}


def _preactivation(convolutions: int) -> Recipe:
    """Of timm: a norm with its ReLU before each convolution; the projection reads the first's."""
    layers = [name for i in range(1, convolutions + 1) for name in (f"norm{i}", f"conv{i}")]
    return residual(*layers, "drop_path", activation="", fork="norm1")


_SE_BOTTLENECK = residual(*BOTTLENECK.main, "se_module")

# library module -> class -> the recipe of its forward
KNOWN: dict[str, dict[str, Recipe]] = {
    "torchvision.models.resnet": {"BasicBlock": BASIC_BLOCK, "Bottleneck": BOTTLENECK},
    "torchvision.models.regnet": {
        "ResBottleneckBlock": residual("f", shortcut="proj", activation="activation"),
    },
    "timm.models.resnet": {
        "BasicBlock": residual(
            *("conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2", "se?", "drop_path?"),
            activation="act2",
        ),
        "Bottleneck": residual(
            *("conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa"),
            *("conv3", "bn3", "se?", "drop_path?"),
            activation="act3",
        ),
    },
    "timm.models.senet": {
        "Bottleneck": _SE_BOTTLENECK,
        "SEResNetBlock": residual("conv1", "bn1", "relu", "conv2", "bn2", "relu", "se_module"),
    },
    "timm.models.resnetv2": {
        "PreActBasic": _preactivation(2),
        "PreActBottleneck": _preactivation(3),
    },
    "timm.models.byobnet": {
        "DownsampleAvg": Recipe(("pool", "conv")),
        "BasicBlock": Recipe(
            ("conv1_kxk", "attn", "conv2_kxk", *_BYOB_END), "shortcut", "act", always=False
        ),
        "BottleneckBlock": Recipe(
            ("conv1_1x1", "conv2_kxk", "conv2b_kxk", "attn", "conv3_1x1", *_BYOB_END),
            *("shortcut", "act"),
            always=False,
        ),
    },
    "timm.layers.conv_bn_act": {"ConvNormAct": Recipe(("conv", "bn", "aa?"))},
    "transformers.models.resnet.modeling_resnet": _transformers("ResNet"),
    "transformers.models.rt_detr.modeling_rt_detr_resnet": _transformers("RTDetrResNet"),
    "transformers.models.regnet.modeling_regnet": _transformers("RegNet"),
    "open_clip.modified_resnet": {
        "Bottleneck": residual(
            *("conv1", "bn1", "act1", "conv2", "bn2", "act2", "avgpool", "conv3", "bn3"),
            activation="act3",
        ),
    },
    "segmentation_models_pytorch.encoders._senet": {"Bottleneck": _SE_BOTTLENECK},
    "torchreid.reid.models.senet": {"Bottleneck": _SE_BOTTLENECK},
    "torchreid.reid.models.resnet": {"BasicBlock": BASIC_BLOCK, "Bottleneck": BOTTLENECK},
    "torchreid.reid.models.resnetmid": {"BasicBlock": BASIC_BLOCK, "Bottleneck": BOTTLENECK},
    "torchreid.reid.models.osnet": {
        "ConvLayer": _CONV_BN_RELU,
        "Conv1x1": _CONV_BN_RELU,
        "Conv1x1Linear": Recipe(("conv", "bn")),
        "Conv3x3": _CONV_BN_RELU,
        "LightConv3x3": Recipe(("conv1", "conv2", "bn", "relu")),
    },
}


# library module -> class -> the method that runs a family's parts
METHODS: dict[str, dict[str, Method]] = {
    "torchvision.models.resnet": {"ResNet": Method("forward", RESNET, inner="_forward_impl")},
    "timm.models.resnet": {
        "ResNet": Method(
            "forward_features", Family(Recipe(("conv1", "bn1", "act1")), "maxpool", STAGES)
        ),
    },
    "torchreid.reid.models.resnet": {
        "ResNet": Method("featuremaps", Family(STEM, "maxpool", STAGES)),
    },
    "open_clip.modified_resnet": {"ModifiedResNet": Method("stem", Family(_CLIP_STEM, "avgpool"))},
}


def _by_return_layers(module: nn.Module) -> Iterator[tuple[str, object]]:
    return ((name, module.return_layers.get(name)) for name in module._modules)


def _smp_result(x: Tensor, out: OrderedDict) -> list[Tensor]:
    return [x, *out.values()]


def _smp_children(module: nn.Module) -> Iterator[tuple[str, object]]:
    names = ("conv1", "bn1", "relu", "maxpool", *STAGES)
    after = {name: depth for depth, name in enumerate(("relu", *STAGES), 1)}
    end = 3 if module._depth == 1 else 3 + module._depth
    return ((name, after.get(name)) for name in (names[:end] if module._depth else ()))


def _timm_collect(module: nn.Module, y: object) -> object:
    if isinstance(y, (tuple, list)):
        return torch.cat(y, 1) if module.concat else y[0]
    return y


TAPS: dict[str, dict[str, Taps]] = {
    "torchvision.models._utils": {"IntermediateLayerGetter": Taps("forward", _by_return_layers)},
    "timm.models._features": {
        "FeatureDictNet": Taps("_collect", _by_return_layers, _timm_collect),
    },
    "segmentation_models_pytorch.encoders.resnet": {
        "ResNetEncoder": Taps("forward", _smp_children, result=_smp_result),
    },
}


def recipe_for(module: nn.Module) -> Recipe | None:
    """The recipe that the module's forward follows, or None if it is not known."""
    if "forward" in module.__dict__ or isinstance(module, torch.jit.ScriptModule):
        return None
    recipe = _look_up(KNOWN, module)
    if recipe is None and is_sequence(module):
        return SEQUENCE
    return recipe or recipe_of(module)


def method_for(module: nn.Module) -> Method | None:
    """The method of a network that runs a family's parts, or None."""
    return _look_up(METHODS, module)


def taps_for(module: nn.Module) -> Taps | None:
    """How a module that calls its children one after the other collects their results, or None."""
    return _look_up(TAPS, module)


def _look_up(table: dict[str, dict], module: nn.Module):
    """The entry of the class whose methods the module runs, or None."""
    kind = class_of(module)
    for library, classes in table.items():
        for name, found in classes.items():
            known = getattr(sys.modules.get(library), name, None)
            methods = [getattr(found, "method", "forward"), getattr(found, "inner", "")]
            if known is not None and all(
                getattr(kind, method, None) is getattr(known, method)
                for method in filter(None, methods)
            ):
                return found
    return None
