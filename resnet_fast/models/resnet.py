# SPDX-License-Identifier: Apache-2.0
"""torchvision's ResNets: the same arguments, attributes, state dict, seeds and errors.

    stem      conv 7x7 /2, BN, ReLU, max-pool 3x3 /2      [N, 3, H, W] -> [N, 64, H/4, W/4]
    layer1-4  blocks of 64, 128, 256, 512 planes; each layer but the first halves the map
    head      global average pool, linear                 -> [N, num_classes]

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015
(arXiv:1512.03385), section 3.3 and table 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resnet_fast.models.blocks import BasicBlock, Bottleneck, conv1x1, conv3x3  # noqa: F401
from resnet_fast.models.registry import register_model
from resnet_fast.models.weights import enum_getattr, overwrite_named_param, takes_weights
from resnet_fast.nn import forward, reasons, recipes

__all__ = [
    "ResNet",
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


class ResNet(nn.Module):
    """A residual network for images, as torchvision builds it.

    Args:
        block: BasicBlock, Bottleneck or a class with their arguments and `expansion`.
        layers: number of blocks in each of the four layers.
        num_classes: rows of `fc`.
        zero_init_residual: start every block as the identity, by a zero weight in its last norm
            (Goyal et al. 2017, arXiv:1706.02677, section 5.1).
        groups, width_per_group: see Bottleneck.
        replace_stride_with_dilation: for layer2, layer3, layer4, whether to keep the map's size and
            dilate instead of striding, as segmentation models do.
        norm_layer: called with a number of channels; BatchNorm2d by default.
        stride_in_1x1: the paper's Bottleneck, with the stride on its first convolution.

    Shape:
        [N, 3, H, W] floating, any memory format -> [N, num_classes]

    Raises:
        ValueError: replace_stride_with_dilation has not three elements.

    Example:
        >>> model = ResNet(Bottleneck, [3, 4, 6, 3]).eval()
        >>> model(torch.rand(2, 3, 224, 224)).shape
        torch.Size([2, 1000])
    """

    family = recipes.RESNET

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        if replace_stride_with_dilation is None:
            replace_stride_with_dilation = [False, False, False]
        if len(replace_stride_with_dilation) != 3:
            raise ValueError(
                "replace_stride_with_dilation should be None "
                f"or a 3-element tuple, got {replace_stride_with_dilation}"
            )
        dilate2, dilate3, dilate4 = replace_stride_with_dilation
        self._norm_layer = norm_layer
        # _make_layer advances these two; detection backbones read the last inplanes.
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.stride_in_1x1 = stride_in_1x1

        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate2)
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate3)
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate4)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)

        _initialize(self, zero_init_residual)

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        """`blocks` blocks: the first strides, or under `dilate` the later ones dilate instead."""
        outplanes = planes * block.expansion
        dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        downsample = None
        if stride != 1 or self.inplanes != outplanes:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, outplanes, stride), self._norm_layer(outplanes)
            )
        shared = (self.groups, self.base_width)
        # Left out unless asked for: a user's own block need not know this argument.
        own = {"stride_in_1x1": True} if self.stride_in_1x1 else {}
        # The first block reads a map that is not dilated yet: it keeps the dilation before.
        first = (self.inplanes, planes, stride, downsample, *shared, dilation, self._norm_layer)
        rest = (outplanes, planes, 1, None, *shared, self.dilation, self._norm_layer)
        self.inplanes = outplanes
        return nn.Sequential(*(block(*args, **own) for args in [first] + [rest] * (blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)

    def _forward_impl(
        self,
        x: Tensor,  # [N, 3, H, W]
    ) -> Tensor:
        # Two conditions in one would be compiled by torch.jit.script, body and all.
        if not torch.jit.is_scripting():  # noqa: SIM102
            if not reasons.is_symbolic(x):
                return forward.network_forward(self, x, recipes.RESNET)
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)

        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


def _initialize(model: ResNet, zero_init_residual: bool) -> None:
    """Draw the weights in torchvision's order, so that equal seeds give equal models.

    Source: He et al. 2015, arXiv:1502.01852, equation 14 (fan-out form).
    """
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.constant_(m.weight, 1)
            nn.init.constant_(m.bias, 0)
    if zero_init_residual:
        for m in model.modules():
            if isinstance(m, Bottleneck) and m.bn3.weight is not None:
                nn.init.constant_(m.bn3.weight, 0)
            elif isinstance(m, BasicBlock) and m.bn2.weight is not None:
                nn.init.constant_(m.bn2.weight, 0)


def _resnet(
    block: type[BasicBlock | Bottleneck],
    layers: Sequence[int],
    weights: Any,  # a member of a torchvision weights enum, or None
    progress: bool,
    **kwargs: Any,
) -> ResNet:
    """A ResNet with those weights loaded, or freshly initialized for None."""
    if weights is not None:
        overwrite_named_param(kwargs, "num_classes", len(weights.meta["categories"]))
    model = ResNet(block, layers, **kwargs)
    if weights is not None:
        model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))
    return model


@register_model()
@takes_weights("ResNet18_Weights")
def resnet18(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18: basic blocks 2, 2, 2, 2 (He et al. 2015, table 1).

    Args:
        weights: a member of torchvision's `ResNet18_Weights`, the name of one, or None.
        progress: show the download on stderr.
        **kwargs: arguments of ResNet.

    Returns:
        The model in training mode: [N, 3, H, W] floating -> [N, num_classes].

    Raises:
        ImportError: weights are asked for without torchvision; the message says what to install.
        KeyError, TypeError: no such weights, or another model's.
        ValueError: an argument contradicts the weights or the model.

    Example:
        >>> model = resnet18(weights="DEFAULT").eval()
    """
    return _resnet(BasicBlock, [2, 2, 2, 2], weights, progress, **kwargs)


@register_model()
@takes_weights("ResNet34_Weights")
def resnet34(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34: basic blocks 3, 4, 6, 3 (He et al. 2015, table 1). Arguments as resnet18's."""
    return _resnet(BasicBlock, [3, 4, 6, 3], weights, progress, **kwargs)


@register_model()
@takes_weights("ResNet50_Weights")
def resnet50(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50: bottlenecks 3, 4, 6, 3 (He et al. 2015, table 1). Arguments as resnet18's."""
    return _resnet(Bottleneck, [3, 4, 6, 3], weights, progress, **kwargs)


@register_model()
@takes_weights("ResNet101_Weights")
def resnet101(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101: bottlenecks 3, 4, 23, 3 (He et al. 2015, table 1). Arguments as resnet18's."""
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, progress, **kwargs)


@register_model()
@takes_weights("ResNet152_Weights")
def resnet152(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152: bottlenecks 3, 8, 36, 3 (He et al. 2015, table 1). Arguments as resnet18's."""
    return _resnet(Bottleneck, [3, 8, 36, 3], weights, progress, **kwargs)


@register_model()
@takes_weights("ResNeXt50_32X4D_Weights")
def resnext50_32x4d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50, 32 groups of 4 (Xie et al. 2016, table 1). Arguments as resnet18's."""
    overwrite_named_param(kwargs, "groups", 32)
    overwrite_named_param(kwargs, "width_per_group", 4)
    return _resnet(Bottleneck, [3, 4, 6, 3], weights, progress, **kwargs)


@register_model()
@takes_weights("ResNeXt101_32X8D_Weights")
def resnext101_32x8d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 32 groups of 8 (Mahajan et al. 2018, arXiv:1805.00932).

    Arguments as resnet18's.
    """
    overwrite_named_param(kwargs, "groups", 32)
    overwrite_named_param(kwargs, "width_per_group", 8)
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, progress, **kwargs)


@register_model()
@takes_weights("ResNeXt101_64X4D_Weights")
def resnext101_64x4d(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 64 groups of 4 (Xie et al. 2016, section 5.1). Arguments as resnet18's."""
    overwrite_named_param(kwargs, "groups", 64)
    overwrite_named_param(kwargs, "width_per_group", 4)
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, progress, **kwargs)


@register_model()
@takes_weights("Wide_ResNet50_2_Weights")
def wide_resnet50_2(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 with 3x3 convolutions twice as wide (Zagoruyko, Komodakis 2016, section 3).

    Arguments as resnet18's.
    """
    overwrite_named_param(kwargs, "width_per_group", 128)
    return _resnet(Bottleneck, [3, 4, 6, 3], weights, progress, **kwargs)


@register_model()
@takes_weights("Wide_ResNet101_2_Weights")
def wide_resnet101_2(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 with 3x3 convolutions twice as wide (Zagoruyko, Komodakis 2016, section 3).

    Arguments as resnet18's.
    """
    overwrite_named_param(kwargs, "width_per_group", 128)
    return _resnet(Bottleneck, [3, 4, 23, 3], weights, progress, **kwargs)
