# SPDX-License-Identifier: Apache-2.0
"""torchvision's model of the same shape and with the same weights as a given one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resnet_fast import models


def torchvision_twin(model: nn.Module, x: Tensor) -> nn.Module:
    """torchvision's builder's model whose state dict has the same names and shapes, plain.

    Args:
        model: one of the ten ResNets: ours, torchvision's, or an optimized one.
        x: whose device and dtype the twin gets; its weights are channels_last.

    Raises:
        ValueError: none of the builders makes such a model, or torchvision is not installed.
    """
    try:
        import torchvision
    except ImportError as error:
        text = f'{error}; pip install "resnet_fast[vision]"'
        raise ValueError(f"compare='torchvision': {text}") from None
    state = model.state_dict()
    shapes = _shapes(state)
    classes = shapes.get("fc.weight", (1000,))[0]
    known = [name for name in models.list_models() if hasattr(torchvision.models, name)]
    for name in known:
        build = getattr(torchvision.models, name)
        with torch.device("meta"):
            alike = _shapes(build(num_classes=classes).state_dict()) == shapes
        if alike:
            with torch.inference_mode(False):
                twin = build(num_classes=classes)
                twin.load_state_dict(state)
                return twin.eval().to(x.device, x.dtype, memory_format=torch.channels_last)
    names = ", ".join(known)
    text = f"torchvision has no model of the shape of this {type(model).__name__}; it has {names}"
    raise ValueError(f"resnet_fast.profile: {text}")


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
