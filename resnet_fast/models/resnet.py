# SPDX-License-Identifier: Apache-2.0
"""torchvision's ResNets: the same arguments, attributes, state dict, seeds and errors.

    stem      conv 7x7 /2, BN, ReLU, max-pool 3x3 /2      [N, 3, H, W] -> [N, 64, H/4, W/4]
    layer1-4  blocks of 64, 128, 256, 512 planes; each layer but the first halves the map
    head      global average pool, linear                 -> [N, num_classes]

    BasicBlock    y = relu(x + bn2(conv2_3x3(relu(bn1(conv1_3x3(x))))))
    Bottleneck    y = relu(x + bn3(conv3_1x1(relu(bn2(conv2_3x3(relu(bn1(conv1_1x1(x)))))))))

where x passes through `downsample` (1x1 convolution, BN) if the block changes its shape.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015
(arXiv:1512.03385), section 3.3 and table 1. Bottleneck has its stride on the 3x3 convolution
(known as v1.5), the paper on the first 1x1: `stride_in_1x1=True` builds the paper's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
