# SPDX-License-Identifier: Apache-2.0
"""The end of a projection block as one op: two convolutions, their BatchNorms, the sum and ReLU.

    y = relu(  (conv(h, weight) - mean) / sqrt(var + eps) * scale + shift
             + (conv1x1(x, proj_weight) - proj_mean) / sqrt(proj_var + proj_eps) * proj_scale
             + proj_shift)

Where one kernel does it, the shortcut never exists in memory. An op of two `conv_bn_act` calls: it
takes, checks and describes each as that op does.

Reading order: schema -> reference -> check_args -> fake -> implementation -> public function.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fast import _hardware
from resnet_fast.dispatch import backends, join
from resnet_fast.ops import _library
from resnet_fast.ops._conv_arguments import Call, Names
from resnet_fast.ops._conv_arguments import check_args as check_conv_args
from resnet_fast.ops._flops import flop_formula
from resnet_fast.ops._library import describe, dtype_name, reject
from resnet_fast.ops.conv_bn_act import key_of, new_output, problem_of
from resnet_fast.ops.conv_bn_act import reference as conv_reference
from resnet_fast.spec import ConvSpec

NAME = "conv_bn_join"
SCHEMA = (
    f"{NAME}(Tensor h, Tensor weight, Tensor scale, Tensor shift, "
    "Tensor x, Tensor proj_weight, Tensor proj_scale, Tensor proj_shift, int[2] stride=1, "
    "Tensor? mean=None, Tensor? var=None, float eps=1e-05, "
    "Tensor? proj_mean=None, Tensor? proj_var=None, float proj_eps=1e-05, "
    "str backend='auto', bool master_weight=False) -> Tensor"
)
OF_MAIN = Names(NAME, {"x": "h"})
OF_PROJECTION = Names(
    NAME, {name: f"proj_{name}" for name in ("weight", "scale", "shift", "mean", "var")}
)


class JoinCall(NamedTuple):
    """The op's arguments, in the schema's order and with its defaults."""

    h: Tensor  # [N, P, Q, C]
    weight: Tensor  # [K, R, S, C]
    scale: Tensor  # [K]
    shift: Tensor  # [K]
    x: Tensor  # [N, H, W, D]
    proj_weight: Tensor  # [K, 1, 1, D]
    proj_scale: Tensor  # [K]
    proj_shift: Tensor  # [K]
    stride: tuple[int, int] = (1, 1)
    mean: Tensor | None = None  # [K]
    var: Tensor | None = None  # [K]
    eps: float = 1e-5
    proj_mean: Tensor | None = None  # [K]
    proj_var: Tensor | None = None  # [K]
    proj_eps: float = 1e-5
    backend: str = "auto"
    master_weight: bool = False  # the weights are float32 beside narrower maps, as under autocast

    def main(self, residual: Tensor | None = None) -> Call:
        """The convolution of h, to which the residual is added."""
        padding = tuple(size // 2 for size in self.weight.shape[2:])
        return Call(
            self.h, self.weight, self.scale, self.shift, residual, padding=padding,
            mean=self.mean, var=self.var, eps=self.eps, master_weight=self.master_weight,
        )  # fmt: skip

    def projection(self) -> Call:
        """The convolution of x."""
        return Call(
            self.x, self.proj_weight, self.proj_scale, self.proj_shift, stride=self.stride,
            activation="none", mean=self.proj_mean, var=self.proj_var, eps=self.proj_eps,
            master_weight=self.master_weight,
        )  # fmt: skip


def reference(call: JoinCall) -> Tensor:  # [N, P, Q, K]
    """The op step by step in torch's own functions, at the dtype of its arguments."""
    return conv_reference(call.main(conv_reference(call.projection())))


def check_args(call: JoinCall) -> tuple[int, int]:
    """Raise ArgumentError unless the op can take `call`; return the output's height and width."""
    weight, proj_weight = call.weight, call.proj_weight
    if weight.dim() == 4 and any(size % 2 == 0 for size in weight.shape[2:]):
        expected = "[K, C, R, S] with R and S odd"
        reject(NAME, "weight", expected, describe(weight), "call conv_bn_act twice")
    if proj_weight.dim() == 4 and proj_weight.shape[2:] != (1, 1):
        reject(NAME, "proj_weight", "[K, D, 1, 1]", describe(proj_weight), "call conv_bn_act twice")
    if call.backend not in join.names():
        reject(NAME, "backend", f"one of {join.names()}", repr(call.backend), "give 'auto'")
    p, q = check_conv_args(call.main(), OF_MAIN)
    shape = [call.x.shape[0], proj_weight.shape[0]]
    shape += check_conv_args(call.projection(), OF_PROJECTION)
    h, x = call.h, call.x
    if x.dtype != h.dtype:
        dtype = dtype_name(h.dtype)
        reject(NAME, "x", f"of h's dtype {dtype}", describe(x), f"call .to(torch.{dtype})")
    if x.device != h.device:
        reject(NAME, "x", f"on h's device {h.device}", describe(x), f"call .to('{h.device}')")
    if shape != [h.shape[0], weight.shape[0], p, q]:
        expected = f"such that its projection has y's shape {[h.shape[0], weight.shape[0], p, q]}"
        got = f"{describe(x)}, which gives {shape}"
        reject(NAME, "x", expected, got, "give the block's input, its projection and its stride")
    return p, q


def _fake(*args, **kwargs) -> Tensor:
    call = JoinCall(*args, **kwargs)
    return new_output(call.h, call.weight.shape[0], *check_args(call))


_plans: dict[tuple, join.JoinPlan] = {}
_last = threading.local()


def plan_of(call: JoinCall) -> join.JoinPlan:
    """The plan for a call's problem; made, and the arguments checked, when it is first met."""
    key = key_of(call.main()), key_of(call.projection()), call.backend
    plan = _plans.get(key)
    if plan is None:
        plan = _library.remember(_plans, key, _make_plan(call))
    return plan


def _make_plan(call: JoinCall) -> join.JoinPlan:
    p, q = check_args(call)
    main, projection = (problem_of(c) for c in (call.main(), call.projection()))
    plan = join.plan(join.JoinProblem(main, projection), call.backend)
    k = main.spec.k
    if main.spec.m * k == 0:
        empty = join.JoinLaunch(lambda h, x: new_output(h, k, p, q))
        plan.bind = lambda *_: empty
    return plan


def _implementation(*args, **kwargs) -> Tensor:
    call = JoinCall(*args, **kwargs)
    plan = plan_of(call)
    plan.calls += 1
    _last.plan = plan
    main, projection = call.main(), call.projection()
    launch = plan.bind(
        *main[1:4], main.mean, main.var, main.eps,
        *projection[1:4], projection.mean, projection.var, projection.eps,
    )  # fmt: skip
    return launch(call.h, call.x)


def last_plan() -> join.JoinPlan:
    """The plan of this thread's last call."""
    return _last.plan


def may_join_in_one_kernel(device: str, backend: str) -> bool:
    """Whether `backend`, or some if it is "auto", could run the op as one kernel on `device`."""
    return join.may_be_one_kernel(device, backend)


def explain(device: str, dtype: str) -> tuple[str, dict[str, str]]:
    """The backend for a typical join here, and why each of the others would not run it."""
    available = device == "cuda" and torch.cuda.is_available()
    main = ConvSpec(8, 28, 28, 128, 512, 1, 1, dtype=dtype, norm=True)
    projection = ConvSpec(
        8, 56, 56, 256, 512, 1, 1, (2, 2), dtype=dtype, norm=True, activation="none"
    )
    parts = (
        backends.Problem(
            spec, device, _hardware.capability_of(torch.device(device)) if available else 0,
            x="channels_last", weight="channels_last", residual="",
            x_strides=(spec.h * spec.w * spec.c, spec.w * spec.c, spec.c), vectors=True,
            vector_dtypes=("float32",) * 4, tracked=True, aligned=True,
        )
        for spec in (main, projection)
    )  # fmt: skip
    return join.explain(join.JoinProblem(*parts))


def _tensors(*args) -> tuple[Tensor | None, ...]:
    call = JoinCall(*args)
    return (*call[:8], call.mean, call.var, call.proj_mean, call.proj_var)


def _under_autocast(device: str):
    """The op under autocast: h and x in autocast's dtype, BatchNorm's vectors in fp32."""

    def cast(*args) -> Tensor:
        call = JoinCall(*args)
        dtype = torch.get_autocast_dtype(device)
        with torch.amp.autocast(device, enabled=False):
            if call.h.dtype == torch.float64:  # autocast leaves float64 alone
                return conv_bn_join_op(*call)
            weights = call.weight, call.proj_weight
            master = torch.float32 != dtype and all(w.dtype == torch.float32 for w in weights)
            weight, proj_weight = weights if master else (w.to(dtype) for w in weights)
            return conv_bn_join_op(
                *call._replace(
                    h=call.h.to(dtype),
                    x=call.x.to(dtype),
                    weight=weight,
                    proj_weight=proj_weight,
                    master_weight=master,
                )
            )

    return cast


# The bare overload: all arguments by position, no checks before the op's own, least overhead.
conv_bn_join_op = _library.register(
    *(NAME, SCHEMA, _implementation, _fake, _tensors),
    reference=lambda *args: reference(JoinCall(*args)),
)
for _device in ("cpu", "cuda"):
    _library.LIBRARY.impl(NAME, _under_autocast(_device), f"Autocast{_device.upper()}")


@flop_formula(torch.ops.resnet_fast.conv_bn_join)
def _flops(h_shape, weight_shape, _scale, _shift, x_shape, proj_shape, *_, out_shape=None, **__):
    """Two operations a multiply-add of both convolutions, as torch counts one."""
    from torch.utils.flop_counter import conv_flop_count

    main = conv_flop_count(h_shape, weight_shape, out_shape)
    return main + conv_flop_count(x_shape, proj_shape, out_shape)


def conv_bn_join(
    h: Tensor,  # [N, P, Q, C]
    weight: Tensor,  # [K, R, S, C]
    scale: Tensor,  # [K]
    shift: Tensor,  # [K]
    x: Tensor,  # [N, H, W, D]
    proj_weight: Tensor,  # [K, 1, 1, D]
    proj_scale: Tensor,  # [K]
    proj_shift: Tensor,  # [K]
    stride: int | tuple[int, int] = 1,
    *,
    mean: Tensor | None = None,  # [K]
    var: Tensor | None = None,  # [K]
    eps: float = 1e-5,
    proj_mean: Tensor | None = None,  # [K]
    proj_var: Tensor | None = None,  # [K]
    proj_eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:  # [N, P, Q, K]
    """The last convolution of a projection block, the projection of its input, their sum and ReLU.

        y = relu(norm(conv(h, weight)) * scale + shift
                 + norm'(conv1x1(x, proj_weight)) * proj_scale + proj_shift)

    Both sums and everything after them are fp32 and rounded once, where one kernel does it (the GPU
    backends); the shortcut is then no tensor. NaN passes the ReLU, as in torch.

    Args:
        h: [N, C, P, Q], what the block's convolutions before the last have made; channels_last in
            memory for the fused kernels; float16, bfloat16, float32 or float64.
        weight: [K, C, R, S] of h's dtype, R and S odd: its convolution has stride 1 and a padding
            of R // 2, S // 2, so that it keeps the map's size; channels_last for the GPU kernels.
        scale, shift: [K], float32 or h's dtype: BatchNorm's weight and bias.
        x: [N, D, H, W] of h's dtype, the block's input, with P = (H - 1) // stride + 1.
        proj_weight: [K, D, 1, 1] of h's dtype.
        proj_scale, proj_shift: [K], float32 or h's dtype. Any scale may be zero.
        stride: of the projection; one integer, or one for height and one for width.
        mean, var, proj_mean, proj_var: [K], the running statistics of each BatchNorm, in pairs;
            None leaves that step out.
        eps, proj_eps: added to var and to proj_var.
        backend: "auto", or the name of the backend to use.

    Returns:
        [N, K, P, Q], channels_last, of h's dtype.

    Raises:
        ArgumentError: a ValueError that names the argument, what was expected and what was given.

    Its gradient is computed anew by torch's own functions, as `conv_bn_act`'s is.

    Example:
        >>> h, x = torch.randn(1, 64, 28, 28), torch.randn(1, 256, 56, 56)
        >>> w, wp = torch.randn(512, 64, 1, 1), torch.randn(512, 256, 1, 1)
        >>> ones, zeros = torch.ones(512), torch.zeros(512)
        >>> y = conv_bn_join(h, w, ones, zeros, x, wp, ones, zeros, stride=2)

    Source: He et al. 2015, equation 2 and section 3.3, option B (the projection shortcut).
    """
    return conv_bn_join_op(
        h, weight, scale, shift, x, proj_weight, proj_scale, proj_shift,
        (stride, stride) if isinstance(stride, int) else tuple(stride),
        mean, var, eps, proj_mean, proj_var, proj_eps, backend,
    )  # fmt: skip
