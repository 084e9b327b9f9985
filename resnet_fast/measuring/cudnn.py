# SPDX-License-Identifier: Apache-2.0
"""torchvision's ResNets by cuDNN's own fused calls, BatchNorm folded: what cuDNN can do at best.

    y = relu(conv(x) + b)        torch.cudnn_convolution_relu
    y = relu(conv(x) + z + b)    torch.cudnn_convolution_add_relu

torch has both, and uses them in nothing that a user calls. The stem does without them: for its
three channels cuDNN's fused call falls back to a kernel that was seen to be 17 times slower
(https://github.com/pytorch/pytorch/issues/68506).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from resnet_fast.measuring.protocol import Missing

fold = nn.utils.fusion.fuse_conv_bn_eval


def conv_relu(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """relu(conv(x)) in one call."""
    return torch.cudnn_convolution_relu(
        x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def conv_add_relu(conv: nn.Conv2d, x: Tensor, residual: Tensor) -> Tensor:
    """relu(conv(x) + residual) in one call."""
    return torch.cudnn_convolution_add_relu(
        x, conv.weight, residual, 1.0, conv.bias,
        conv.stride, conv.padding, conv.dilation, conv.groups,
    )  # fmt: skip


class CudnnFused(nn.Module):
    """A torchvision ResNet in eval mode: its blocks by `conv_relu` and `conv_add_relu`.

    Args:
        model: in float32, where BatchNorm is folded; cast the result to the dtype wanted.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        model = copy.deepcopy(model)
        self.stem, self.maxpool = fold(model.conv1, model.bn1), model.maxpool
        stages = (model.layer1, model.layer2, model.layer3, model.layer4)
        self.blocks = nn.ModuleList(_block(block) for stage in stages for block in stage)
        self.avgpool, self.fc = model.avgpool, model.fc

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(torch.relu_(self.stem(x)))
        for block in self.blocks:
            shortcut = block["projection"](x) if "projection" in block else x
            *first, last = (part for name, part in block.items() if name != "projection")
            for conv in first:
                x = conv_relu(conv, x)
            x = conv_add_relu(last, x, shortcut)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _block(block: nn.Module) -> nn.ModuleDict:
    parts = {f"conv{i}": fold(getattr(block, f"conv{i}"), getattr(block, f"bn{i}"))
             for i in (1, 2, 3) if hasattr(block, f"conv{i}")}  # fmt: skip
    if block.downsample is not None:
        parts["projection"] = fold(*block.downsample)
    return nn.ModuleDict(parts)


def check_available(device: torch.device) -> None:
    """Raise Missing where there is no cuDNN to call."""
    if device.type != "cuda":
        raise Missing(f"cuDNN runs on a GPU, not on the {device.type}")
