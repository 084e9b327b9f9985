# SPDX-License-Identifier: Apache-2.0
"""torchvision's models and ours with the same weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resnet_fast import models
from resnet_fast.measuring.checkpoints import torchvision_model


def build_pair(name: str, weights: str | None, pixels: Tensor) -> tuple[nn.Module, nn.Module]:
    """torchvision's model and ours with the same weights, float32, in eval mode, on the CPU.

    Raises:
        ValueError: unknown model, and the message lists the known ones; or weights that do not fit.
    """
    name = models.registry.model_name(name)
    torch.manual_seed(0)
    theirs = torchvision_model(name, weights)
    if weights is None:
        _calibrate(theirs, pixels)
    ours = models.get_model(name)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


@torch.no_grad()
def _calibrate(model: nn.Module, pixels: Tensor) -> None:
    """Give random weights the BatchNorm statistics of the photographs: signals stay in range."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a cumulative average: the statistics of all that is seen
    model.train()(pixels)
    for norm in norms:
        norm.momentum = 0.1


def torchvision_twin(model: nn.Module, x: Tensor) -> nn.Module:
    """torchvision's model with the same names and shapes in its state dict, not fused.

    Args:
        model: one of the ten ResNets: ours, torchvision's, or an optimized one.
        x: the twin gets its device and dtype; the weights are channels_last.

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
