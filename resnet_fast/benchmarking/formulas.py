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

    def __init__(self, case: OpCase) -> None:
        super().__init__()
        self.conv, self.norm = _unit(case.spec)
        self.activation = case.spec.activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(self.conv(x))
        if residual is not None:
            y += residual
        return F.relu(y, inplace=True) if self.activation == "relu" else y

    def ours(self, backend: str) -> Callable[..., Tensor]:
        tensors, norm, c = _affine(self.conv, self.norm), _statistics(self.norm), self.conv
        geometry = (c.stride, c.padding, c.dilation, c.groups, self.activation)
        return lambda x, residual=None: ops.conv_bn_act(
            x, *tensors, residual, *geometry, **norm, backend=backend
        )


class AddRelu(nn.Module):
    """relu(x + y)."""

    def __init__(self, case: OpCase) -> None:
        super().__init__()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(x + y, inplace=True)

    def ours(self, backend: str) -> Callable[..., Tensor]:
        return ops.add_relu


class ConvBnJoin(nn.Module):
    """relu(norm(conv(h)) + proj_norm(proj(x)))."""

    def __init__(self, case: OpCase) -> None:
        super().__init__()
        self.conv, self.norm = _unit(case.spec)
        self.proj, self.proj_norm = _unit(case.projection)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        y = self.norm(self.conv(h))
        y += self.proj_norm(self.proj(x))
        return F.relu(y, inplace=True)

    def ours(self, backend: str) -> Callable[..., Tensor]:
        main, projected = _affine(self.conv, self.norm), _affine(self.proj, self.proj_norm)
        norm, stride = _statistics(self.norm), self.proj.stride
        norm |= {f"proj_{name}": value for name, value in _statistics(self.proj_norm).items()}
        rest = {"stride": stride, **norm, "backend": backend}
        join = ops.CONV_BN_JOIN
        return lambda h, x: join.overload(*join.Call(h, *main, x, *projected, **rest))


class StemPool(nn.Module):
    """maxpool(relu(norm(conv(x))))."""

    def __init__(self, case: OpCase) -> None:
        super().__init__()
        self.conv, self.norm = _unit(case.spec)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.norm(self.conv(x)), inplace=True), 3, 2, 1)

    def ours(self, backend: str) -> Callable[..., Tensor]:
        tensors, norm = _affine(self.conv, self.norm), _statistics(self.norm)
        return lambda x: ops.stem_pool(x, *tensors, **norm, backend=backend)


FORMULAS = {
    "conv_bn_act": ConvBnAct,
    "add_relu": AddRelu,
    ops.CONV_BN_JOIN.name: ConvBnJoin,
    "stem_pool": StemPool,
}


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


def _affine(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor]:
    return conv.weight.detach(), norm.weight.detach(), norm.bias.detach()


def _statistics(norm: nn.BatchNorm2d) -> dict[str, object]:
    return {"mean": norm.running_mean, "var": norm.running_var, "eps": norm.eps}


def module_of(case: OpCase) -> nn.Module:
    """The op as a module in eval mode, of the case's dtype, on the CPU."""
    module = FORMULAS[case.op](case).eval().to(torch_dtype(case.dtype))
    return module.to(memory_format=torch.channels_last)


def input_shapes(case: OpCase) -> list[tuple[int, int, int, int]]:
    """The [N, C, H, W] of the op's inputs, in the order in which the modules take them."""
    out = (case.spec.n, case.spec.k, case.spec.p, case.spec.q)
    added = 2 if case.op == "add_relu" else int(case.spec.residual)
    return [(s.n, s.c, s.h, s.w) for s in case.convolutions] + [out] * added


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
