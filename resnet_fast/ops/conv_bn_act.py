# SPDX-License-Identifier: Apache-2.0
"""Convolution, BatchNorm, residual add and ReLU as one op.

    y = act((conv(x, weight) - mean) / sqrt(var + eps) * scale + shift + residual)

BatchNorm's tensors are arguments, not folded into anything: what the op computes is what they hold
at the call. The op chooses its backend inside (`dispatch/table.py`), so torch.compile and
torch.export see one opaque node.

Its arguments and their checks are in `_conv_arguments.py`.
"""

from __future__ import annotations

import functools
from operator import or_

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from resnet_fast.dispatch.problem import ConvProblem
from resnet_fast.kernels import aten
from resnet_fast.ops._conv_arguments import NAME, Call, check_args
from resnet_fast.ops._library import dtype_name
from resnet_fast.ops._op import Op, facts, layout_of, precision, where
from resnet_fast.spec import ConvSpec


def reference(call: Call) -> Tensor:  # [N, P, Q, K]
    """The op step by step in torch's own functions, at the dtype of its arguments."""
    return aten.conv_bn_act(*call._replace(weight=call.weight.to(call.x.dtype))[:-2])


def new_output(x: Tensor, filters: int, p: int, q: int) -> Tensor:  # [N, P, Q, K]
    shape = (x.shape[0], filters, p, q)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def key_of(call: Call) -> tuple:
    """All that `check_args` and the choice of a plan read."""
    x, weight, scale, shift, residual, stride, padding, dilation, groups, activation = call[:10]
    mean, var, backend = call.mean, call.var, call.backend
    key = (
        facts(x), facts(weight), facts(scale), facts(shift), *stride, *padding, *dilation,
        groups, activation, backend, call.master_weight,
        residual is not None and facts(residual), mean is not None and facts(mean),
        var is not None and facts(var),
        weight.is_inference(), torch._C._get_mkldnn_enabled(),
    )  # fmt: skip
    if x.is_cuda:
        key += (_addresses(call) % 16, x.dtype == torch.float32 and precision())
    return key


def _addresses(call: Call) -> int:
    """The addresses of all tensors, or-ed: a multiple of 16 if all are."""
    tensors = (*call[:5], call.mean, call.var)
    return functools.reduce(or_, (t.data_ptr() for t in tensors if t is not None))


def spec_of(call: Call) -> ConvSpec:
    """The convolution of a call."""
    x, weight = call.x, call.weight
    return ConvSpec(
        n=x.shape[0], h=x.shape[2], w=x.shape[3], c=x.shape[1],
        k=weight.shape[0], r=weight.shape[2], s=weight.shape[3],
        stride=tuple(call.stride), padding=tuple(call.padding), dilation=tuple(call.dilation),
        groups=call.groups, dtype=dtype_name(x.dtype), activation=call.activation,
        residual=call.residual is not None, norm=call.mean is not None,
        precision=precision() if x.is_cuda else "ieee",
    )  # fmt: skip


def problem_of(call: Call) -> ConvProblem:
    """A call, its arguments checked, as the backends see it."""
    x, weight, residual = call.x, call.weight, call.residual
    vectors = (call.scale, call.shift, call.mean, call.var)
    return ConvProblem(
        spec=spec_of(call),
        **where(x),
        x=layout_of(x),
        weight=layout_of(weight),
        residual="" if residual is None else layout_of(residual),
        x_strides=(x.stride(0), x.stride(2), x.stride(3)),
        vectors=all(v is None or v.is_contiguous() for v in vectors),
        vector_dtypes=tuple(v if v is None else dtype_name(v.dtype) for v in vectors),
        tracked=not weight.is_inference(),
        aligned=_addresses(call) % 16 == 0,
    )


def sample(spec: ConvSpec, device: torch.device) -> Call:
    """Random operands, dense and channels_last, with BatchNorm's vectors in the maps' dtype."""
    dtype = getattr(torch, spec.dtype)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def nhwc(*shape: int) -> Tensor:
        return normal(*shape).to(dtype).contiguous(memory_format=torch.channels_last)

    weight = (2 / spec.k_gemm) ** 0.5 * nhwc(spec.k, spec.c // spec.groups, spec.r, spec.s)
    residual = nhwc(spec.n, spec.k, spec.p, spec.q) if spec.residual else None
    vectors = [normal(spec.k).abs() + 0.5, normal(spec.k)]
    vectors += [normal(spec.k), normal(spec.k).abs() + 0.5] if spec.norm else []
    scale, shift, mean, var = [v.to(dtype) for v in vectors] + [None] * (4 - len(vectors))
    geometry = (spec.stride, spec.padding, spec.dilation, spec.groups, spec.activation)
    x = nhwc(spec.n, spec.c, spec.h, spec.w)
    return Call(x, weight, scale, shift, residual, *geometry, mean, var)


class ConvBnAct(Op):
    """The op, and its variant `conv_bn_act_` that writes y over residual."""

    name, Call, Problem = NAME, Call, ConvProblem

    def __init__(self) -> None:
        super().__init__()
        # For a caller that owns residual and needs it no more.
        self.inplace = self.define(f"{NAME}_", self._write, self._fake_write, writes="residual")

    reference = staticmethod(reference)
    check_args = staticmethod(check_args)
    key_of, spec_of, problem_of = map(staticmethod, (key_of, spec_of, problem_of))
    sample = staticmethod(sample)

    def output(self, call: Call) -> Tensor:
        return new_output(call.x, call.weight.shape[0], *check_args(call))

    def layer(self, call: Call) -> tuple:
        return call.weight, call.scale, call.shift, call.mean, call.var, call.eps

    def inputs(self, call: Call) -> tuple:
        return call.x, call.residual

    def _write(self, *args, **kwargs) -> None:
        call = Call(*args, **kwargs)
        if torch._C._is_alias_of(call.x, call.residual):  # a kernel reads x after it has written y
            call.residual.copy_(self.run(call))
        else:
            self.run(call, True)
            increment_version(call.residual)  # a GPU kernel's write is not seen by autograd

    def _fake_write(self, *args, **kwargs) -> None:
        self.check_args(Call(*args, **kwargs))

    def cast(self, call: Call, dtype: torch.dtype) -> Call:
        """x and residual in autocast's dtype; BatchNorm's vectors, and a float32 weight, as is.

        `torch.library.register_autocast` would round the vectors too, and the weight anew in each
        call.
        """
        if call.x.dtype == torch.float64:  # autocast leaves float64 alone
            return call
        master = call.weight.dtype == torch.float32 != dtype
        residual = call.residual
        return call._replace(
            x=call.x.to(dtype),
            weight=call.weight if master else call.weight.to(dtype),
            residual=residual if residual is None else residual.to(dtype),
            master_weight=master,
        )

    def typical(self, dtype: str) -> ConvSpec:
        return ConvSpec(
            8, 56, 56, 64, 64, 3, 3, padding=(1, 1), dtype=dtype, residual=True, norm=True
        )

    def flops(self, x, weight, _scale, _shift, residual=None, *_, out_shape=None, **__) -> int:
        """Two operations a multiply-add, as torch counts a convolution; the epilogue adds none."""
        from torch.utils.flop_counter import conv_flop_count

        return conv_flop_count(x, weight, out_shape or residual)


CONV_BN_ACT = ConvBnAct()


def conv_bn_act(
    x: Tensor,  # [N, H, W, C]
    weight: Tensor,  # [K, R, S, C / groups]
    scale: Tensor,  # [K]
    shift: Tensor,  # [K]
    residual: Tensor | None = None,  # [N, P, Q, K]
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    activation: str = "relu",
    *,
    mean: Tensor | None = None,  # [K]
    var: Tensor | None = None,  # [K]
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:  # [N, P, Q, K]
    """Convolution, BatchNorm in inference, residual add and ReLU in one pass over memory.

        y = act((conv(x, weight) - mean) / sqrt(var + eps) * scale + shift + residual)

    The sum and everything after it is fp32 and rounded once. NaN passes the ReLU, as in torch.

    Args:
        x: [N, C, H, W], channels_last in memory for the fused kernels; float16, bfloat16, float32
            or float64.
        weight: [K, C / groups, R, S] of x's dtype; channels_last for the GPU kernels.
        scale, shift: [K], float32 or x's dtype: BatchNorm's weight and bias, or any affine map.
        residual: [N, K, P, Q] of x's dtype, added before the activation; None for nothing.
        stride, padding, dilation: one integer, or one for height and one for width.
        groups: divides C and K.
        activation: "relu" or "none".
        mean, var: [K], BatchNorm's running statistics; None leaves that step out.
        eps: added to var.
        backend: "auto", or the name of the backend to use (`resnet-fast check` lists them).

    Returns:
        [N, K, P, Q], channels_last, of x's dtype.

    Raises:
        ArgumentError: a ValueError that names the argument, what was expected and what was given.

    Its gradient is that of the same formula in torch's own functions, which the backward pass
    computes anew: right, and no faster than torch. Second derivatives are refused by torch.

    Example:
        >>> x = torch.randn(1, 64, 56, 56).to(memory_format=torch.channels_last)
        >>> w = torch.randn(64, 64, 3, 3).to(memory_format=torch.channels_last)
        >>> y = conv_bn_act(x, w, torch.ones(64), torch.zeros(64), padding=1)

    Source: He et al. 2015, section 3.4 (BatchNorm after each convolution, before activation);
    Ioffe and Szegedy 2015, section 3.1 (BatchNorm in inference is an affine map).
    """
    return CONV_BN_ACT.overload(
        x, weight, scale, shift, residual, _pair(stride), _pair(padding), _pair(dilation), groups,
        activation, mean, var, eps, backend,
    )  # fmt: skip


def conv_bn_act_(x, weight, scale, shift, residual, stride=1, padding=0, dilation=1, groups=1,
                 activation="relu", **keywords) -> Tensor:  # fmt: skip
    """`conv_bn_act` that writes y over residual and returns it, for a caller that owns residual.

    Args and errors are those of `conv_bn_act`; a separate output is neither allocated nor written.
    It has no gradient, for what that needs is overwritten: a call that needs one is a RuntimeError.
    """
    CONV_BN_ACT.inplace(
        x, weight, scale, shift, residual, _pair(stride), _pair(padding), _pair(dilation), groups,
        activation, **keywords,
    )  # fmt: skip
    return residual


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
