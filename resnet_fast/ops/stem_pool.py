# SPDX-License-Identifier: Apache-2.0
"""A ResNet's stem as one op: 7x7/2 convolution on three channels, BatchNorm, ReLU, 3x3/2 max-pool.

    y = maxpool(relu((conv(x, weight) - mean) / sqrt(var + eps) * scale + shift))

Its map before the pool is the largest of the network; the CUDA kernel never writes it. Decoded
images may be given as they are: uint8 in either layout, with mean and standard deviation.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fast import _hardware
from resnet_fast.dispatch import backends, stem
from resnet_fast.ops import _library
from resnet_fast.ops._flops import flop_formula
from resnet_fast.ops._library import describe, dtype_name, reject
from resnet_fast.ops.conv_bn_act import _facts, _layout, precision
from resnet_fast.spec import ELEMENT_SIZE, ConvSpec

NAME = "stem_pool"
SCHEMA = (
    "stem_pool(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? mean=None, "
    "Tensor? var=None, float eps=1e-05, Tensor? image_mean=None, Tensor? image_std=None, "
    "str backend='auto') -> Tensor"
)
FILTER = (3, 7, 7)  # [C, R, S]
ANY_LAYOUT = "cuda"  # the backend whose kernel takes x in any layout

reference = stem.reference
has_kernels = stem.has_kernels
BACKENDS = stem.names()  # what the `backend` argument may be


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


def check_args(call: StemCall) -> ConvSpec:
    """Raise ArgumentError unless the op can take `call`; return its convolution."""
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
    if call.backend not in BACKENDS:
        expected = f"one of {list(BACKENDS)}"
        reject(NAME, "backend", expected, repr(call.backend), "give 'auto'")
    return ConvSpec(
        x.shape[0], x.shape[2], x.shape[3], 3, weight.shape[0], 7, 7, (2, 2), (3, 3),
        dtype=dtype_name(weight.dtype), norm=call.mean is not None,
        precision=precision() if x.is_cuda else "ieee",
    )  # fmt: skip


def _check_vector(name: str, vector: Tensor | None, length: int, dtypes: tuple) -> None:
    if vector is None:
        return
    if vector.dim() != 1 or vector.shape[0] != length:
        remedy = "give one value for each filter, or for each channel of x"
        reject(NAME, name, f"of shape [{length}]", describe(vector), remedy)
    if vector.dtype not in dtypes:
        expected = " or ".join(dict.fromkeys(map(dtype_name, dtypes)))
        reject(NAME, name, expected, describe(vector), "call .float()")


def _fake(*args, **kwargs) -> Tensor:
    call = StemCall(*args, **kwargs)
    return stem.new_output(check_args(call), call.x.device)


_plans: dict[tuple, backends.Plan] = {}
_last = threading.local()


def plan_of(call: StemCall) -> backends.Plan:
    """The plan for a call's problem; made, and the arguments checked, when it is first met."""
    key = _key(call)
    plan = _plans.get(key)
    if plan is None:
        plan = _library.remember(_plans, key, _make_plan(call))
    return plan


def reads(call: StemCall) -> bool:
    """Whether the kernel that would run reads x as it lies; others want channels_last."""
    return call.backend in ("auto", ANY_LAYOUT) and plan_of(call).backend == ANY_LAYOUT


def _implementation(*args, **kwargs) -> Tensor:
    call = StemCall(*args, **kwargs)
    plan = plan_of(call)
    plan.calls += 1
    _last.plan = plan
    return plan.bind(*call[1:-1])(call.x, None)


def last_plan() -> backends.Plan:
    """The plan of this thread's last call."""
    return _last.plan


def _key(call: StemCall) -> tuple:
    """All that check_args and the choice of a plan read."""
    facts = tuple(t if t is None else _facts(t) for t in _tensors(*call))
    key = (*facts, call.backend, call.weight.is_inference(), torch._C._get_mkldnn_enabled())
    if call.x.is_cuda:
        key += (_are_aligned(*call[1:6]), _are_aligned(call.x), precision())
    return key


def _are_aligned(*tensors: Tensor | None) -> bool:
    """Whether each starts at a multiple of 16 bytes: GPU kernels read so many at a time."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def _make_plan(call: StemCall) -> backends.Plan:
    spec = check_args(call)
    x, weight = call.x, call.weight
    vectors = (call.scale, call.shift, call.mean, call.var)
    problem = backends.Problem(
        spec=spec,
        device=x.device.type,
        arch=_hardware.capability_of(x.device) if x.is_cuda else 0,
        hardware=_hardware.gpu_of(x.device) if x.is_cuda else None,
        x=_layout(x),
        weight=_layout(weight),
        residual="",
        x_strides=(x.stride(0), x.stride(2), x.stride(3)),
        vectors=all(v is None or v.is_contiguous() for v in (*vectors, *call[7:9])),
        vector_dtypes=tuple(v if v is None else dtype_name(v.dtype) for v in vectors),
        tracked=not weight.is_inference(),
        aligned=_are_aligned(weight, *vectors),
    )
    asked = stem.Stem(problem, x.dtype == torch.uint8, _are_aligned(x))
    plan = stem.plan(asked, call.backend)
    if spec.m * spec.k == 0:
        empty = backends.Direct(lambda x, *_: stem.new_output(spec, x.device))
        plan.bind = lambda *_: empty
    return plan


def explain(device: str, dtype: str) -> tuple[str, dict[str, str]]:
    """The backend for ImageNet's stem here, and why each of the others would not run it."""
    spec = ConvSpec(8, 224, 224, 3, 64, 7, 7, (2, 2), (3, 3), dtype=dtype, norm=True)
    available = device == "cuda" and torch.cuda.is_available()
    problem = backends.Problem(
        spec, device, _hardware.capability_of(torch.device(device)) if available else 0,
        x="channels_last", weight="channels_last", residual="",
        x_strides=(3 * 224 * 224, 3 * 224, 3), vectors=True,
        vector_dtypes=("float32",) * 4, tracked=True, aligned=True,
    )  # fmt: skip
    return stem.explain(stem.Stem(problem))


def _tensors(*args) -> tuple[Tensor | None, ...]:
    call = StemCall(*args)
    return (*call[:6], call.image_mean, call.image_std)


stem_pool_op = _library.register(
    *(NAME, SCHEMA, _implementation, _fake, _tensors),
    reference=lambda *args: reference(*StemCall(*args)[:-1]),
)


def _under_autocast(device: str):
    """x and weight in autocast's dtype, as a convolution's; the vectors as they are."""

    def cast(*args) -> Tensor:
        call = StemCall(*args)
        dtype = torch.get_autocast_dtype(device)
        with torch.amp.autocast(device, enabled=False):
            if call.weight.dtype != torch.float64:  # autocast leaves float64 alone
                x = call.x if call.x.dtype == torch.uint8 else call.x.to(dtype)
                call = call._replace(x=x, weight=call.weight.to(dtype))
            return stem_pool_op(*call)

    return cast


for _device in ("cpu", "cuda"):
    _library.LIBRARY.impl(NAME, _under_autocast(_device), f"Autocast{_device.upper()}")


@flop_formula(torch.ops.resnet_fast.stem_pool)
def _flops(x_shape, weight_shape, *_, **__) -> int:
    """Two operations a multiply-add of the convolution; torch counts none for a pool."""
    n, _, h, w = x_shape
    return ConvSpec(n, h, w, 3, weight_shape[0], 7, 7, (2, 2), (3, 3)).flops


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
    return stem_pool_op(x, weight, scale, shift, mean, var, eps, image_mean, image_std, backend)
