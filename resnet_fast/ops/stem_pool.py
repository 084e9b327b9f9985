# SPDX-License-Identifier: Apache-2.0
"""A ResNet's stem as one op: 7x7/2 convolution on three channels, BatchNorm, ReLU, 3x3/2 max-pool.

    y = maxpool(relu((conv(x, weight) - mean) / sqrt(var + eps) * scale + shift))

Its map before the pool is the largest of the network; the CUDA kernel never writes it. Decoded
images may be given as they are: uint8 in either layout, with mean and standard deviation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fast.dispatch import table
from resnet_fast.dispatch.problem import ConvProblem, StemProblem, new_pooled
from resnet_fast.dispatch.steps import normalize
from resnet_fast.dispatch.table import AUTO
from resnet_fast.kernels import aten
from resnet_fast.ops._library import describe, dtype_name, reject
from resnet_fast.ops._op import Op, are_aligned, facts, layout_of, precision, where
from resnet_fast.ops.conv_bn_act import CONV_BN_ACT
from resnet_fast.spec import ELEMENT_SIZE, ConvSpec, StemSpec

NAME = StemProblem.op
FILTER = (3, 7, 7)  # [C, R, S]


class StemCall(NamedTuple):
    """The op's arguments, in the schema's order and with its defaults."""

    x: Tensor  # [N, 3, H, W]
    weight: Tensor  # [K, 7, 7, 3]
    scale: Tensor  # [K]
    shift: Tensor  # [K]
    mean: Tensor | None = None  # [K]
    var: Tensor | None = None  # [K]
    eps: float = 1e-5
    image_mean: Tensor | None = None  # [3]
    image_std: Tensor | None = None  # [3]
    backend: str = "auto"


def reference(call: StemCall) -> Tensor:  # [N, PP, PQ, K]
    """The op step by step in torch's own functions, at weight's dtype."""
    weight = call.weight
    x = normalize(call.x, call.image_mean, call.image_std, weight.dtype)
    geometry = ((2, 2), (3, 3), (1, 1), 1, "relu")
    vectors = (call.scale, call.shift, None, *geometry, call.mean, call.var, call.eps)
    y = F.max_pool2d(aten.conv_bn_act(x, weight, *vectors), 3, 2, 1)
    return y.contiguous(memory_format=torch.channels_last)


def check_args(call: StemCall) -> None:
    """Raise ArgumentError unless the op can take `call`."""
    x, weight = call.x, call.weight
    for name in ("x", "weight", "scale", "shift", "mean", "var", "image_mean", "image_std"):
        tensor = getattr(call, name)
        if tensor is None:
            continue
        if tensor.layout != torch.strided:
            reject(NAME, name, "a dense tensor", describe(tensor), "call .to_dense()")
        if tensor.device != x.device:
            remedy = f"call .to('{x.device}')"
            reject(NAME, name, f"on x's device {x.device}", describe(tensor), remedy)
    if dtype_name(weight.dtype) not in ELEMENT_SIZE:
        expected = f"of a floating dtype, one of {list(ELEMENT_SIZE)}"
        reject(NAME, "weight", expected, describe(weight), "call .float()")
    if weight.dim() != 4 or weight.shape[1:] != FILTER:
        remedy = "for another convolution call conv_bn_act, then torch's max_pool2d"
        reject(NAME, "weight", "[K, 3, 7, 7]", describe(weight), remedy)
    if x.dim() != 4 or x.shape[1] != 3 or x.shape[2] < 1 or x.shape[3] < 1:
        remedy = "a single image becomes a batch by x[None]"
        reject(NAME, "x", "[N, 3, H, W], only N may be 0", describe(x), remedy)
    if x.dtype not in (weight.dtype, torch.uint8):
        dtype = dtype_name(weight.dtype)
        expected = f"of weight's dtype {dtype}, or uint8"
        reject(NAME, "x", expected, describe(x), f"call .to(torch.{dtype})")
    for name in ("scale", "shift", "mean", "var"):
        _check_vector(name, getattr(call, name), weight.shape[0], (torch.float32, weight.dtype))
    for name in ("image_mean", "image_std"):
        _check_vector(name, getattr(call, name), 3, (torch.float32,))
    for pair in (("mean", "var"), ("image_mean", "image_std")):
        given = [name for name in pair if getattr(call, name) is not None]
        if len(given) == 1:
            both, remedy = " and ".join(pair), "give the other one too"
            reject(NAME, both, "both given or both left out", f"only {given[0]}", remedy)
    if call.image_mean is not None and x.dtype != torch.uint8:
        remedy = "normalize floating images yourself, or give them as uint8"
        reject(NAME, "image_mean", "left out unless x is uint8", describe(x), remedy)
    if call.backend not in table.names(NAME):
        expected = f"one of {table.names(NAME)}"
        reject(NAME, "backend", expected, repr(call.backend), "give 'auto'")


def _check_vector(name: str, vector: Tensor | None, length: int, dtypes: tuple) -> None:
    if vector is None:
        return
    if vector.dim() != 1 or vector.shape[0] != length:
        remedy = "give one value for each filter, or for each channel of x"
        reject(NAME, name, f"of shape [{length}]", describe(vector), remedy)
    if vector.dtype not in dtypes:
        expected = " or ".join(dict.fromkeys(map(dtype_name, dtypes)))
        reject(NAME, name, expected, describe(vector), "call .float()")


class StemPool(Op):
    """The op."""

    name, Call, Problem = NAME, StemCall, StemProblem
    reference = staticmethod(reference)
    check_args = staticmethod(check_args)

    def output(self, call: StemCall) -> Tensor:
        check_args(call)
        return new_pooled(self.spec_of(call), call.x.device)

    def key_of(self, call: StemCall) -> tuple:
        tensors = (*call[:6], call.image_mean, call.image_std)
        key = tuple(t if t is None else facts(t) for t in tensors)
        key += (call.backend, call.weight.is_inference(), torch._C._get_mkldnn_enabled())
        if call.x.is_cuda:
            key += (are_aligned(*call[1:6]), are_aligned(call.x), precision())
        return key

    def spec_of(self, call: StemCall) -> StemSpec:
        (n, _, h, w), weight = call.x.shape, call.weight
        return StemSpec(ConvSpec(
            n, h, w, 3, weight.shape[0], 7, 7, (2, 2), (3, 3), dtype=dtype_name(weight.dtype),
            norm=call.mean is not None, precision=precision() if call.x.is_cuda else "ieee",
        ))  # fmt: skip

    def problem_of(self, call: StemCall) -> StemProblem:
        x, weight = call.x, call.weight
        vectors = call.scale, call.shift, call.mean, call.var
        conv = ConvProblem(
            spec=self.spec_of(call).conv,
            **where(x),
            x=layout_of(x),
            weight=layout_of(weight),
            residual="",
            x_strides=(x.stride(0), x.stride(2), x.stride(3)),
            vectors=all(
                v is None or v.is_contiguous() for v in (*vectors, call.image_mean, call.image_std)
            ),
            vector_dtypes=tuple(v if v is None else dtype_name(v.dtype) for v in vectors),
            tracked=not weight.is_inference(),
            aligned=are_aligned(weight, *vectors),
        )
        return StemProblem(conv=conv, image=x.dtype == torch.uint8, x_aligned=are_aligned(x))

    def layer(self, call: StemCall) -> tuple:
        return call[1:-1]

    def inputs(self, call: StemCall) -> tuple:
        return (call.x,)

    def cast(self, call: StemCall, dtype: torch.dtype) -> StemCall:
        """x and weight in autocast's dtype, as a convolution's; the vectors as they are."""
        if call.weight.dtype == torch.float64:  # autocast leaves float64 alone
            return call
        x = call.x if call.x.dtype == torch.uint8 else call.x.to(dtype)
        return call._replace(x=x, weight=call.weight.to(dtype))

    def typical(self, dtype: str) -> StemSpec:
        return StemSpec(ConvSpec(8, 224, 224, 3, 64, 7, 7, (2, 2), (3, 3), dtype=dtype, norm=True))

    def sample(self, spec: StemSpec, device: torch.device) -> StemCall:
        c = CONV_BN_ACT.sample(spec.conv, device)
        return StemCall(c.x, c.weight, c.scale, c.shift, c.mean, c.var)

    def flops(self, x, weight, *_, **__) -> int:
        """Two operations a multiply-add of the convolution; torch counts none for a pool."""
        n, _, h, w = x
        return ConvSpec(n, h, w, 3, weight[0], 7, 7, (2, 2), (3, 3)).flops

    def reads(self, call: StemCall) -> bool:
        """Whether the kernel that would run reads x as it lies; others want channels_last."""
        asked = table.row_of(NAME, call.backend)
        if call.backend != AUTO and not asked.any_layout:
            return False
        return self.plan_of(call).row.any_layout


STEM_POOL = StemPool()


def stem_pool(
    x: Tensor,  # [N, 3, H, W]
    weight: Tensor,  # [K, 7, 7, 3]
    scale: Tensor,  # [K]
    shift: Tensor,  # [K]
    *,
    mean: Tensor | None = None,  # [K]
    var: Tensor | None = None,  # [K]
    eps: float = 1e-5,
    image_mean: Tensor | None = None,  # [3]
    image_std: Tensor | None = None,  # [3]
    backend: str = "auto",
) -> Tensor:  # [N, PP, PQ, K]
    """The stem of a ResNet: 7x7/2 convolution, BatchNorm in inference, ReLU, 3x3/2 max-pool.

        y = maxpool(relu((conv(x, weight) - mean) / sqrt(var + eps) * scale + shift))

    Paddings are 3 and 1. A sum is fp32 and rounded once, before the pool. NaN passes both the ReLU
    and the pool, as in torch.

    Args:
        x: [N, 3, H, W] of weight's dtype, or uint8 for (x / 255 - image_mean) / image_std; the
            CUDA kernel takes it in any layout, the others want channels_last, uint8 apart.
        weight: [K, 3, 7, 7]; channels_last for the GPU kernels.
        scale, shift: [K], float32 or weight's dtype: BatchNorm's weight and bias.
        mean, var: [K], BatchNorm's running statistics; None leaves that step out.
        eps: added to var.
        image_mean, image_std: [3] float32, of images in [0, 1]; None for 0 and 1. Only for uint8.
        backend: "auto", "cuda", "triton", "cpu" or "aten".

    Returns:
        [N, K, PP, PQ], channels_last, of weight's dtype; 56 x 56 of 224 x 224.

    Raises:
        ArgumentError: a ValueError that names the argument, what was expected and what was given.

    Its gradient is computed anew by torch's own functions, as `conv_bn_act`'s is.

    Example:
        >>> image = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
        >>> w = torch.randn(64, 3, 7, 7).to(memory_format=torch.channels_last)
        >>> y = stem_pool(image, w, torch.ones(64), torch.zeros(64))

    Source: He et al. 2015, table 1 (conv1, and the max-pool that begins conv2_x).
    """
    return STEM_POOL.overload(
        x, weight, scale, shift, mean, var, eps, image_mean, image_std, backend
    )
