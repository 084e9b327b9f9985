# SPDX-License-Identifier: Apache-2.0
"""Residual blocks, with torchvision's arguments, names and errors.

    BasicBlock    y = relu(x + bn2(conv2_3x3(relu(bn1(conv1_3x3(x))))))
    Bottleneck    y = relu(x + bn3(conv3_1x1(relu(bn2(conv2_3x3(relu(bn1(conv1_1x1(x)))))))))

where x passes through `downsample` (1x1 convolution, BN) if the block changes its shape.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015
(arXiv:1512.03385), section 3.3. Bottleneck has its stride on the 3x3 convolution (known as v1.5),
the paper on the first 1x1: `stride_in_1x1=True` builds the paper's.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from resnet_fast.nn import forward, recipes


def conv3x3(
    in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps H and W at stride 1, whatever its dilation."""
    return nn.Conv2d(
        in_planes,
        out_planes,
        kernel_size=3,
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=groups,
        bias=False,
    )


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(in_planes, out_planes, kernel_size=1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: the block of ResNet-18 and -34 (figure 5, left).

    Args:
        inplanes: channels of the input.
        planes: channels of the output.
        stride: of `conv1`; a `downsample` must have the same.
        downsample: what the shortcut does to x where the shape changes; None for identity.
        groups, base_width, dilation: must be 1, 64, 1; there for Bottleneck's sake.
        norm_layer: called with a number of channels; BatchNorm2d by default.
        stride_in_1x1: must be False; there for Bottleneck's sake.

    Shape:
        [N, inplanes, H, W] -> [N, planes, ceil(H / stride), ceil(W / stride)]

    Raises:
        ValueError: groups, base_width or stride_in_1x1 that this block does not have.
        NotImplementedError: dilation > 1.
    """

    expansion: int = 1
    recipe = recipes.BASIC_BLOCK

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError("BasicBlock only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in BasicBlock")
        if stride_in_1x1:
            raise ValueError("BasicBlock has no 1x1 convolution: stride_in_1x1 must be False")
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._forward_plain(x)
        return forward.block_forward(self, x)

    def _forward_plain(
        self,
        x: Tensor,  # [N, C, H, W]
    ) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut: the block of ResNet-50 and up (figure 5, right).

    The first 1x1 narrows to `width = int(planes * base_width / 64) * groups` channels, the last
    widens to `4 * planes`. ResNeXt sets groups (Xie et al. 2016, arXiv:1611.05431, table 1), wide
    ResNets base_width (Zagoruyko, Komodakis 2016, arXiv:1605.07146).

    Args:
        inplanes: channels of the input.
        planes: a quarter of the channels of the output.
        stride: of `conv2`; a `downsample` must have the same.
        downsample: what the shortcut does to x where the shape changes; None for identity.
        groups: of `conv2`.
        base_width: width of a group, in 64ths of planes.
        dilation: of `conv2`.
        norm_layer: called with a number of channels; BatchNorm2d by default.
        stride_in_1x1: put the stride on `conv1`, as in the paper and its Caffe models.

    Shape:
        [N, inplanes, H, W] -> [N, 4 * planes, ceil(H / stride), ceil(W / stride)]
    """

    expansion: int = 4
    recipe = recipes.BOTTLENECK

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv1x1(inplanes, width, stride_1x1)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride_3x3, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._forward_plain(x)
        return forward.block_forward(self, x)

    def _forward_plain(
        self,
        x: Tensor,  # [N, C, H, W]
    ) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)
