# SPDX-License-Identifier: Apache-2.0
"""Models: torchvision's ResNets, name for name, and a registry to find them by name.

    from resnet_fast.models import ResNet50_Weights, resnet50

    model = resnet50(weights=ResNet50_Weights.DEFAULT)

The weights enums are torchvision's own; they are looked up there when named, and left out of
`__all__` so that a star import works without torchvision.
"""

from resnet_fast.models.registry import get_model, get_model_builder, list_models, register_model
from resnet_fast.models.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from resnet_fast.models.weights import enum_getattr

__all__ = [
    "ResNet",
    "get_model",
    "get_model_builder",
    "list_models",
    "register_model",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

__getattr__ = enum_getattr(__name__)
