# SPDX-License-Identifier: Apache-2.0
"""The end of a projection block as one op: two convolutions, their BatchNorms, the sum and ReLU.

    y = relu(  (conv(h, weight) - mean) / sqrt(var + eps) * scale + shift
             + (conv1x1(x, proj_weight) - proj_mean) / sqrt(proj_var + proj_eps) * proj_scale
             + proj_shift)

Where one kernel does it, the shortcut never exists in memory. An op of two `conv_bn_act` calls: it
takes, checks and describes each as that op does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fast.dispatch import table
from resnet_fast.dispatch.problem import JoinProblem
from resnet_fast.ops._conv_arguments import Call, Names
from resnet_fast.ops._conv_arguments import check_args as check_conv_args
from resnet_fast.ops._library import describe, dtype_name, reject
from resnet_fast.ops._op import Op
from resnet_fast.ops.conv_bn_act import CONV_BN_ACT, key_of, new_output, problem_of, spec_of
from resnet_fast.spec import ConvSpec, JoinSpec

NAME = JoinProblem.op
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
    return CONV_BN_ACT.reference(call.main(CONV_BN_ACT.reference(call.projection())))


def check_args(call: JoinCall) -> tuple[int, int]:
    """Raise ArgumentError unless the op can take `call`; return the output's height and width."""
    weight, proj_weight = call.weight, call.proj_weight
    if weight.dim() == 4 and any(size % 2 == 0 for size in weight.shape[2:]):
        expected = "[K, C, R, S] with R and S odd"
        reject(NAME, "weight", expected, describe(weight), "call conv_bn_act twice")
    if proj_weight.dim() == 4 and proj_weight.shape[2:] != (1, 1):
        reject(NAME, "proj_weight", "[K, D, 1, 1]", describe(proj_weight), "call conv_bn_act twice")
    if call.backend not in table.names(NAME):
        reject(NAME, "backend", f"one of {table.names(NAME)}", repr(call.backend), "give 'auto'")
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


class ConvBnJoin(Op):
    """The op: each of its two convolutions is described as `conv_bn_act`'s."""

    name, Call, Problem = NAME, JoinCall, JoinProblem
    reference = staticmethod(reference)
    check_args = staticmethod(check_args)

    def output(self, call: JoinCall) -> Tensor:
        return new_output(call.h, call.weight.shape[0], *check_args(call))

    def key_of(self, call: JoinCall) -> tuple:
        return key_of(call.main()), key_of(call.projection()), call.backend

    def spec_of(self, call: JoinCall) -> JoinSpec:
        return JoinSpec(spec_of(call.main()), spec_of(call.projection()))

    def problem_of(self, call: JoinCall) -> JoinProblem:
        return JoinProblem(problem_of(call.main()), problem_of(call.projection()))

    def layer(self, call: JoinCall) -> tuple:
        return (
            call.weight, call.scale, call.shift, call.mean, call.var, call.eps,
            call.proj_weight, call.proj_scale, call.proj_shift,
            call.proj_mean, call.proj_var, call.proj_eps,
        )  # fmt: skip

    def inputs(self, call: JoinCall) -> tuple:
        return call.h, call.x

    def cast(self, call: JoinCall, dtype: torch.dtype) -> JoinCall:
        """h and x in autocast's dtype; BatchNorms' vectors, and float32 weights, as they are."""
        if call.h.dtype == torch.float64:  # autocast leaves float64 alone
            return call
        weights = call.weight, call.proj_weight
        master = torch.float32 != dtype and all(w.dtype == torch.float32 for w in weights)
        weight, proj_weight = weights if master else (w.to(dtype) for w in weights)
        return call._replace(
            h=call.h.to(dtype),
            x=call.x.to(dtype),
            weight=weight,
            proj_weight=proj_weight,
            master_weight=master,
        )

    def typical(self, dtype: str) -> JoinSpec:
        same = {"dtype": dtype, "norm": True}
        main = ConvSpec(8, 28, 28, 128, 512, 1, 1, **same)
        return JoinSpec(
            main, ConvSpec(8, 56, 56, 256, 512, 1, 1, (2, 2), activation="none", **same)
        )

    def sample(self, spec: JoinSpec, device: torch.device) -> JoinCall:
        m, p = (CONV_BN_ACT.sample(part, device) for part in (spec.main, spec.projection))
        return JoinCall(
            *m[:4], *p[:4], spec.projection.stride, m.mean, m.var, m.eps, p.mean, p.var, p.eps
        )

    def flops(self, h, weight, _scale, _shift, x, proj_weight, *_, out_shape=None, **__) -> int:
        """Two operations a multiply-add of both convolutions, as torch counts one."""
        from torch.utils.flop_counter import conv_flop_count

        main = conv_flop_count(h, weight, out_shape)
        return main + conv_flop_count(x, proj_weight, out_shape)


CONV_BN_JOIN = ConvBnJoin()


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
    return CONV_BN_JOIN.overload(
        h, weight, scale, shift, x, proj_weight, proj_scale, proj_shift,
        (stride, stride) if isinstance(stride, int) else tuple(stride),
        mean, var, eps, proj_mean, proj_var, proj_eps, backend,
    )  # fmt: skip
