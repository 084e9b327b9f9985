# SPDX-License-Identifier: Apache-2.0
"""Convolution, BatchNorm, residual add and ReLU as one op.

    y = act((conv(x, weight) - mean) / sqrt(var + eps) * scale + shift + residual)

BatchNorm's tensors are arguments, not folded into anything: what the op computes is what they hold
at the call. The op chooses its backend inside (`dispatch/backends.py`), so torch.compile and
torch.export see one opaque node.

Reading order: schema -> reference -> check_args (`_conv_arguments.py`) -> fake -> implementation ->
public function.
"""

from __future__ import annotations

import functools
import threading
from operator import or_

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from resnet_fast import _hardware
from resnet_fast.dispatch import backends
from resnet_fast.kernels import aten
from resnet_fast.ops import _library
from resnet_fast.ops._conv_arguments import NAME, Call, check_args
from resnet_fast.ops._flops import flop_formula
from resnet_fast.ops._library import dtype_name
from resnet_fast.spec import ConvSpec

ARGUMENTS = (
    "int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, str activation='relu', "
    "Tensor? mean=None, Tensor? var=None, float eps=1e-05, "
    "str backend='auto', bool master_weight=False"
)
TENSORS = "Tensor x, Tensor weight, Tensor scale, Tensor shift"
SCHEMA = f"conv_bn_act({TENSORS}, Tensor? residual=None, {ARGUMENTS}) -> Tensor"
# Writes y over residual: for a caller that owns residual and needs it no more.
SCHEMA_INPLACE = f"conv_bn_act_({TENSORS}, Tensor(a!) residual, {ARGUMENTS}) -> ()"


def reference(call: Call) -> Tensor:  # [N, P, Q, K]
    """The op step by step in torch's own functions, at the dtype of its arguments."""
    return aten.conv_bn_act(*call._replace(weight=call.weight.to(call.x.dtype))[:-2])


def new_output(x: Tensor, filters: int, p: int, q: int) -> Tensor:  # [N, P, Q, K]
    shape = (x.shape[0], filters, p, q)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _fake(*args, **kwargs) -> Tensor:
    call = Call(*args, **kwargs)
    return new_output(call.x, call.weight.shape[0], *check_args(call))


def _fake_inplace(*args, **kwargs) -> None:
    check_args(Call(*args, **kwargs))


# ---- implementation: facts of the call -> plan, made once -> run

_plans: dict[tuple, backends.Plan] = {}
_last = threading.local()


def plan_of(call: Call) -> backends.Plan:
    """The plan for a call's problem; made, and the arguments checked, when it is first met."""
    key = key_of(call)
    plan = _plans.get(key)
    if plan is None:
        plan = _library.remember(_plans, key, _make_plan(call))
    return plan


def _run(call: Call, inplace: bool) -> Tensor:
    plan = plan_of(call)
    plan.calls += 1
    _last.plan = plan
    launch = plan.bind(call.weight, call.scale, call.shift, call.mean, call.var, call.eps)
    return launch(call.x, call.residual, inplace)


def _implementation(*args, **kwargs) -> Tensor:
    return _run(Call(*args, **kwargs), inplace=False)


def _implementation_inplace(*args, **kwargs) -> None:
    call = Call(*args, **kwargs)
    if torch._C._is_alias_of(call.x, call.residual):  # a kernel reads x after it has written y
        call.residual.copy_(_run(call, inplace=False))
    else:
        _run(call, inplace=True)
        increment_version(call.residual)  # a GPU kernel's write is not seen by autograd


def last_plan() -> backends.Plan:
    """The plan of this thread's last call."""
    return _last.plan


def plans() -> list[backends.Plan]:
    """All problems met so far, with the backend chosen for each and how often it was called."""
    return list(_plans.values())


def explain(device: str, dtype: str) -> tuple[str, dict[str, str]]:
    """The backend for a typical convolution here, and why each of the others would not run it."""
    spec = ConvSpec(8, 56, 56, 64, 64, 3, 3, padding=(1, 1), dtype=dtype, residual=True, norm=True)
    layouts = {"x": "channels_last", "weight": "channels_last", "residual": "channels_last"}
    available = device == "cuda" and torch.cuda.is_available()
    problem = backends.Problem(
        spec, device, _hardware.capability_of(torch.device(device)) if available else 0, **layouts,
        x_strides=(64 * 56 * 56, 64 * 56, 64), vectors=True,
        vector_dtypes=("float32",) * 4, tracked=True, aligned=True,
    )  # fmt: skip
    return backends.explain(problem)


def key_of(call: Call) -> tuple:
    """All that check_args and the choice of a plan read: the same key needs neither again."""
    x, weight, scale, shift, residual, stride, padding, dilation, groups, activation = call[:10]
    mean, var, backend = call.mean, call.var, call.backend
    key = (
        _facts(x), _facts(weight), _facts(scale), _facts(shift), *stride, *padding, *dilation,
        groups, activation, backend, call.master_weight,
        residual is not None and _facts(residual), mean is not None and _facts(mean),
        var is not None and _facts(var),
        weight.is_inference(), torch._C._get_mkldnn_enabled(),
    )  # fmt: skip
    if x.is_cuda:
        key += (_addresses(call) % 16, x.dtype == torch.float32 and precision())
    return key


def _addresses(call: Call) -> int:
    """The addresses of all tensors, or-ed: a multiple of 16 if all are."""
    return functools.reduce(or_, (t.data_ptr() for t in _tensors(*call) if t is not None))


def _facts(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _make_plan(call: Call) -> backends.Plan:
    p, q = check_args(call)
    problem = problem_of(call)
    plan = backends.plan(problem, call.backend)
    spec = problem.spec
    if spec.m * spec.k == 0:
        plan.bind = lambda *_: backends.Direct(lambda x, *_: new_output(x, spec.k, p, q))
    return plan


def problem_of(call: Call) -> backends.Problem:
    """A call, its arguments checked, as the backends see it."""
    x, weight, residual = call.x, call.weight, call.residual
    vectors = (call.scale, call.shift, call.mean, call.var)
    spec = ConvSpec(
        n=x.shape[0], h=x.shape[2], w=x.shape[3], c=x.shape[1],
        k=weight.shape[0], r=weight.shape[2], s=weight.shape[3],
        stride=tuple(call.stride), padding=tuple(call.padding), dilation=tuple(call.dilation),
        groups=call.groups, dtype=dtype_name(x.dtype), activation=call.activation,
        residual=residual is not None, norm=call.mean is not None,
        precision=precision() if x.is_cuda else "ieee",
    )  # fmt: skip
    return backends.Problem(
        spec=spec,
        device=x.device.type,
        arch=_hardware.capability_of(x.device) if x.is_cuda else 0,
        hardware=_hardware.gpu_of(x.device) if x.is_cuda else None,
        x=_layout(x),
        weight=_layout(weight),
        residual="" if residual is None else _layout(residual),
        x_strides=(x.stride(0), x.stride(2), x.stride(3)),
        vectors=all(v is None or v.is_contiguous() for v in vectors),
        vector_dtypes=tuple(v if v is None else dtype_name(v.dtype) for v in vectors),
        tracked=not weight.is_inference(),
        aligned=_addresses(call) % 16 == 0,
        gpu=torch.cuda.get_device_name(x.device) if x.is_cuda else "",
    )


def precision() -> str:
    """ "tf32" where cuDNN would use TF32 for a float32 convolution, else "ieee"."""
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def _layout(tensor: Tensor) -> str:
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return "channels_last"
    if tensor.is_contiguous():
        return "contiguous"
    return "channels_inner" if tensor.stride(1) == 1 else "strided"


def _tensors(*args) -> tuple[Tensor | None, ...]:
    call = Call(*args)
    return (*call[:5], call.mean, call.var)


def _under_autocast(op, device: str):
    """The op under autocast: x and residual in autocast's dtype, BatchNorm's vectors in fp32.

    `torch.library.register_autocast` would round the vectors too, and the weight anew in each call.
    A residual that is written to is not cast, as y would be lost with the copy: the op rejects it.
    """
    read_only = op is conv_bn_act_op

    def cast(*args) -> Tensor | None:
        call = Call(*args)
        dtype = torch.get_autocast_dtype(device)
        with torch.amp.autocast(device, enabled=False):
            if call.x.dtype == torch.float64:  # autocast leaves float64 alone
                return op(*call)
            master = call.weight.dtype == torch.float32 != dtype
            residual = call.residual
            if read_only and residual is not None:
                residual = residual.to(dtype)
            return op(
                *call._replace(
                    x=call.x.to(dtype),
                    weight=call.weight if master else call.weight.to(dtype),
                    residual=residual,
                    master_weight=master,
                )
            )

    return cast


# The bare overloads: all arguments by position, no checks before the op's own, least overhead.
conv_bn_act_op = _library.register(
    NAME, SCHEMA, _implementation, _fake, _tensors, reference=lambda *args: reference(Call(*args))
)
conv_bn_act_op_ = _library.register(
    NAME + "_", SCHEMA_INPLACE, _implementation_inplace, _fake_inplace, _tensors
)
for _device in ("cpu", "cuda"):
    for _name, _overload in ((NAME, conv_bn_act_op), (NAME + "_", conv_bn_act_op_)):
        _cast = _under_autocast(_overload, _device)
        _library.LIBRARY.impl(_name, _cast, f"Autocast{_device.upper()}")


@flop_formula(torch.ops.resnet_fast.conv_bn_act)
@flop_formula(torch.ops.resnet_fast.conv_bn_act_)
def _flops(x_shape, weight_shape, _scale, _shift, residual_shape=None, *_, out_shape=None, **__):
    """Two operations a multiply-add, as torch counts a convolution; the epilogue adds none."""
    from torch.utils.flop_counter import conv_flop_count

    return conv_flop_count(x_shape, weight_shape, out_shape or residual_shape)


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
    return conv_bn_act_op(
        x, weight, scale, shift, residual, _pair(stride), _pair(padding), _pair(dilation), groups,
        activation, mean, var, eps, backend,
    )  # fmt: skip


def conv_bn_act_(x, weight, scale, shift, residual, stride=1, padding=0, dilation=1, groups=1,
                 activation="relu", **keywords) -> Tensor:  # fmt: skip
    """`conv_bn_act` that writes y over residual and returns it, for a caller that owns residual.

    Args and errors are those of `conv_bn_act`; a separate output is neither allocated nor written.
    It has no gradient, for what that needs is overwritten: a call that needs one is a RuntimeError.
    """
    conv_bn_act_op_(
        x, weight, scale, shift, residual, _pair(stride), _pair(padding), _pair(dilation), groups,
        activation, **keywords,
    )  # fmt: skip
    return residual


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)
