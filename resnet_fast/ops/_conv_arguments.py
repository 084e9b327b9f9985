# SPDX-License-Identifier: Apache-2.0
"""The arguments of `conv_bn_act`, and why some are refused: for its real and fake versions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fast.dispatch import table
from resnet_fast.ops._library import describe, dtype_name, reject
from resnet_fast.spec import ACTIVATIONS, ELEMENT_SIZE, conv_output_size

NAME = "conv_bn_act"
DTYPES = tuple(ELEMENT_SIZE)
VECTORS = ("scale", "shift", "mean", "var")


class Call(NamedTuple):
    """The op's arguments, in the schema's order and with its defaults."""

    x: Tensor  # [N, H, W, C]
    weight: Tensor  # [K, R, S, C / groups]
    scale: Tensor  # [K]
    shift: Tensor  # [K]
    residual: Tensor | None = None  # [N, P, Q, K]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    activation: str = "relu"
    mean: Tensor | None = None  # [K]
    var: Tensor | None = None  # [K]
    eps: float = 1e-5
    backend: str = "auto"
    master_weight: bool = False  # weight is float32 beside a narrower x, as under autocast


@dataclass(frozen=True)
class Names:
    """What the op at hand is called, and its arguments where they have other names than `Call`'s.

    A join checks its two convolutions here, each in its own words.
    """

    op: str = NAME
    arguments: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> str:
        return self.arguments.get(name, name)

    def reject(self, name: str, expected: str, got: object, remedy: str) -> None:
        reject(self.op, self[name], expected, got, remedy)


def check_args(call: Call, names: Names = Names()) -> tuple[int, int]:
    """Raise ArgumentError unless the op can take `call`; return the output's height and width.

    The same for real and for fake tensors: only shapes, dtypes, devices and layouts are read.
    """
    _check_tensors(call, names)
    x, weight = call.x, call.weight
    for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = getattr(call, name)
        if len(value) != 2 or any(v < least for v in value):
            expected = f"two integers of at least {least} (height, width)"
            remedy = "give one integer, or one for height and one for width"
            if name == "padding":
                remedy = "for another padding call torch.nn.functional.pad"
            names.reject(name, expected, list(value), remedy)
    for name, known in (("activation", ACTIVATIONS), ("backend", table.names(NAME))):
        value = getattr(call, name)
        if value not in known:
            remedy = "take another function of 'none'" if name == "activation" else "give 'auto'"
            names.reject(name, f"one of {list(known)}", repr(value), remedy)
    channels, filters = x.shape[1], weight.shape[0]
    if call.groups < 1 or filters % call.groups or channels % call.groups:
        expected = f"a divisor of C = {channels} and K = {filters}"
        names.reject(
            "groups", expected, call.groups, f"give the groups that {names['weight']} was made for"
        )
    if weight.shape[1] * call.groups != channels:
        expected = f"[K, C / groups, R, S] with C / groups = {channels} / {call.groups}"
        remedy = f"{names['x']} must have {weight.shape[1] * call.groups} channels for this weight"
        names.reject("weight", expected, describe(weight), remedy)
    p, q = (
        conv_output_size(
            x.shape[2 + i], weight.shape[2 + i], call.stride[i], call.padding[i], call.dilation[i]
        )
        for i in (0, 1)
    )
    if p < 1 or q < 1:
        expected = f"at least as large as the dilated {weight.shape[2]}x{weight.shape[3]} filter"
        names.reject("x", expected, f"{describe(x)}, which leaves no output", "add padding")
    if call.residual is not None and call.residual.shape != (x.shape[0], filters, p, q):
        expected = f"of y's shape {[x.shape[0], filters, p, q]}"
        remedy = "project it with a 1x1 convolution"
        names.reject("residual", expected, describe(call.residual), remedy)
    return p, q


def _check_tensors(call: Call, names: Names) -> None:
    x = call.x
    if dtype_name(x.dtype) not in DTYPES:
        expected = f"of a floating dtype, one of {list(DTYPES)}"
        names.reject("x", expected, describe(x), "call .float()")
    for name in ("x", "weight", "residual", *VECTORS):
        tensor = getattr(call, name)
        if tensor is None:
            continue
        if tensor.layout != torch.strided:
            names.reject(name, "a dense tensor", describe(tensor), "call .to_dense()")
        if tensor.device != x.device:
            remedy = f"call .to('{x.device}')"
            names.reject(name, f"on {names['x']}'s device {x.device}", describe(tensor), remedy)
        if name in VECTORS:
            _check_vector(name, tensor, call, names)
        else:
            _check_map(name, tensor, call, names)
    if (call.mean is None) != (call.var is None):
        given = f"only {names['mean' if call.var is None else 'var']}"
        remedy = "give running_mean and running_var, or fold them into scale and shift"
        both = f"{names['mean']} and {names['var']}"
        names.reject(both, "both given or both left out", given, remedy)


def _check_map(name: str, tensor: Tensor, call: Call, names: Names) -> None:
    if tensor.dim() != 4:
        expected = "[K, C / groups, R, S]" if name == "weight" else "4-D [N, C, H, W]"
        names.reject(name, expected, describe(tensor), "add the missing dimensions")
    if name != "residual" and any(size < 1 for size in tensor.shape[1:]):
        remedy = f"only N, and K of {names['weight']}, may be 0"
        names.reject(name, "without empty dimensions", describe(tensor), remedy)
    master = name == "weight" and call.master_weight and tensor.dtype == torch.float32
    if tensor.dtype != call.x.dtype and not master:
        dtype = dtype_name(call.x.dtype)
        remedy = f"call .to(torch.{dtype})"
        names.reject(name, f"of {names['x']}'s dtype {dtype}", describe(tensor), remedy)


def _check_vector(name: str, tensor: Tensor, call: Call, names: Names) -> None:
    filters = call.weight.shape[0]
    if tensor.dim() != 1 or tensor.shape[0] != filters:
        remedy = f"give one value for each filter of {names['weight']}"
        names.reject(name, f"[K] with K = {filters}", describe(tensor), remedy)
    if tensor.dtype not in (torch.float32, call.x.dtype):
        expected = f"float32 or {dtype_name(call.x.dtype)}"
        names.reject(name, expected, describe(tensor), "call .float()")
