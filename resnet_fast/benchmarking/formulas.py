# SPDX-License-Identifier: Apache-2.0
"""The ops as plain torch modules: what eager runs, what compilers are given, and the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast import ops
from resnet_fast.benchmarking.cases import OpCase, torch_dtype
from resnet_fast.spec import ConvSpec


class ConvBnAct(nn.Module):
    """act(norm(conv(x)) + residual)."""

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__()
        self.conv, self.norm = _unit(spec)
        self.activation = spec.activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(self.conv(x))
        if residual is not None:
            y += residual
        return F.relu(y, inplace=True) if self.activation == "relu" else y


class AddRelu(nn.Module):
    """relu(x + y)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(x + y, inplace=True)


class ConvBnJoin(nn.Module):
    """relu(norm(conv(h)) + proj_norm(proj(x)))."""

    def __init__(self, spec: ConvSpec, projection: ConvSpec) -> None:
        super().__init__()
        self.conv, self.norm = _unit(spec)
        self.proj, self.proj_norm = _unit(projection)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        y = self.norm(self.conv(h))
        y += self.proj_norm(self.proj(x))
        return F.relu(y, inplace=True)


class StemPool(nn.Module):
    """maxpool(relu(norm(conv(x))))."""

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__()
        self.conv, self.norm = _unit(spec)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.norm(self.conv(x)), inplace=True), 3, 2, 1)


def _unit(spec: ConvSpec) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution and a BatchNorm with statistics as a trained network has them."""
    conv = nn.Conv2d(
        spec.c, spec.k, (spec.r, spec.s), spec.stride, spec.padding, spec.dilation, spec.groups,
        bias=False,
    )  # fmt: skip
    norm = nn.BatchNorm2d(spec.k)
    with torch.no_grad():
        nn.init.kaiming_normal_(conv.weight, mode="fan_in")
        for tensor in (norm.weight, norm.running_var):
            tensor.uniform_(0.5, 1.5)
        for tensor in (norm.bias, norm.running_mean):
            tensor.uniform_(-0.5, 0.5)
    return conv, norm


def module_of(case: OpCase) -> nn.Module:
    """The op as a module in eval mode, of the case's dtype, on the CPU."""
    build = {
        "conv_bn_act": lambda: ConvBnAct(case.spec),
        "add_relu": AddRelu,
        "conv_bn_join": lambda: ConvBnJoin(case.spec, case.projection),
        "stem_pool": lambda: StemPool(case.spec),
    }[case.op]
    return build().eval().to(torch_dtype(case.dtype)).to(memory_format=torch.channels_last)


def input_shapes(case: OpCase) -> list[tuple[int, int, int, int]]:
    """The [N, C, H, W] of the op's inputs, in the order in which the modules take them."""
    s, out = case.spec, (case.spec.n, case.spec.k, case.spec.p, case.spec.q)
    x = (s.n, s.c, s.h, s.w)
    if case.op == "add_relu":
        return [out, out]
    if case.projection:
        p = case.projection
        return [x, (p.n, p.c, p.h, p.w)]
    return [x, out] if s.residual else [x]


def folded(module: nn.Module) -> nn.Module:
    """The module with each BatchNorm folded into its convolution, in float32, then cast back.

    A convolution's name is followed by its norm's: conv, norm and proj, proj_norm.
    """
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    result = copy.deepcopy(module).float()
    for conv, norm in (("conv", "norm"), ("proj", "proj_norm")):
        if hasattr(result, conv):
            fused = nn.utils.fusion.fuse_conv_bn_eval(getattr(result, conv), getattr(result, norm))
            setattr(result, conv, fused)
            setattr(result, norm, nn.Identity())
    return result.to(dtype).to(memory_format=torch.channels_last)


def ours(case: OpCase, module: nn.Module, backend: str) -> Callable[..., Tensor]:
    """Our op bound to the module's tensors."""
    if case.op == "add_relu":
        return ops.add_relu
    s, n = case.spec, module.norm
    statistics = {"mean": n.running_mean, "var": n.running_var, "eps": n.eps, "backend": backend}
    affine = (module.conv.weight.detach(), n.weight.detach(), n.bias.detach())
    if case.op == "stem_pool":
        return lambda x: ops.stem_pool(x, *affine, **statistics)
    if case.op == "conv_bn_join":
        p = module.proj_norm
        shortcut = (module.proj.weight.detach(), p.weight.detach(), p.bias.detach())
        more = {"proj_mean": p.running_mean, "proj_var": p.running_var, "proj_eps": p.eps}
        stride = case.projection.stride
        return lambda h, x: ops.conv_bn_join(h, *affine, x, *shortcut, stride, **statistics, **more)
    geometry = (s.stride, s.padding, s.dilation, s.groups, s.activation)
    return lambda x, residual=None: ops.conv_bn_act(x, *affine, residual, *geometry, **statistics)
