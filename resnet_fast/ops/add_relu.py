# SPDX-License-Identifier: Apache-2.0
"""The residual join: relu(x + y). The smallest op, and the guide for the next one.

A new op is this file with another formula: schema -> reference -> check_args -> fake ->
implementation -> gradient -> public function; a kernel file in `kernels/`; tests that compare the
two; a line in `ops/__init__.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fast.dispatch import backends, gradient
from resnet_fast.kernels import aten
from resnet_fast.ops import _library
from resnet_fast.ops._flops import flop_formula
from resnet_fast.ops._library import describe, dtype_name, reject

NAME, BACKWARD = "add_relu", "_add_relu_backward"
# 1. The schema: every argument and default, once.
SCHEMA = "add_relu(Tensor x, Tensor y) -> Tensor"

# 2. The reference: what the op means, in torch's own functions.
reference = aten.add_relu


# 3. The checks: they read no data, so the real and the fake implementation share them.
def check_args(x: Tensor, y: Tensor) -> None:
    """Raise ArgumentError unless x and y are dense, alike in shape and dtype, and in one place."""
    for name, tensor in (("x", x), ("y", y)):
        if not tensor.is_floating_point():
            reject(NAME, name, "of a floating dtype", describe(tensor), "call .float()")
        if tensor.layout != torch.strided:
            reject(NAME, name, "a dense tensor", describe(tensor), "call .to_dense()")
    if y.shape != x.shape:
        reject(NAME, "y", f"of x's shape {list(x.shape)}", describe(y), "call .expand_as(x)")
    if y.dtype != x.dtype:
        dtype = dtype_name(x.dtype)
        reject(NAME, "y", f"of x's dtype {dtype}", describe(y), f"call .to(torch.{dtype})")
    if y.device != x.device:
        reject(NAME, "y", f"on x's device {x.device}", describe(y), f"call .to('{x.device}')")


# 4. The fake: the output without data, in the layout that the implementation gives.
def _fake(x: Tensor, y: Tensor) -> Tensor:
    check_args(x, y)
    return torch.empty_like(torch.add(x, y) if x.stride() != y.stride() else x)


# 5. The implementation: the backend is chosen here, under the op, so that graphs stay whole.
def _implementation(x: Tensor, y: Tensor) -> Tensor:
    check_args(x, y)
    return backends.add_relu(x, y)


def explain(device: str, dtype: str) -> tuple[str, dict[str, str]]:
    """The backend for dense tensors of a dtype here, and why each of the others would not run."""
    return backends.explain_add_relu(device, dtype)


# 6. The gradient: an op of its own, so that a traced backward stays whole as well. What is saved is
#    the output, which the next layer keeps anyway; where it is 0 or less, nothing passes.
def _check_backward(grad: Tensor, y: Tensor) -> None:
    if grad.shape != y.shape:
        shape = list(y.shape)
        reject(BACKWARD, "grad", f"of y's shape {shape}", describe(grad), "call .expand_as(y)")
    if grad.dtype != y.dtype:
        dtype = dtype_name(y.dtype)
        remedy = f"call .to(torch.{dtype})"
        reject(BACKWARD, "grad", f"of y's dtype {dtype}", describe(grad), remedy)


def _fake_backward(grad: Tensor, y: Tensor) -> Tensor:
    _check_backward(grad, y)
    alike = grad.stride() == y.stride()
    return torch.empty_like(grad) if alike else aten.add_relu_backward(grad, y)


def _backward_implementation(grad: Tensor, y: Tensor) -> Tensor:
    _check_backward(grad, y)
    return gradient.add_relu_backward(grad, y)


def _save(ctx, inputs, output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    masked = _op_backward(grad, *ctx.saved_tensors)
    return masked, masked


# The mask is linear in grad and the same at every order: it is its own gradient.
_op_backward = _library.register(
    BACKWARD,
    f"{BACKWARD}(Tensor grad, Tensor y) -> Tensor",
    _backward_implementation,
    _fake_backward,
    lambda grad, y: (grad,),
    save=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
    backward=lambda ctx, grad: (_op_backward(grad, *ctx.saved_tensors), None),
)
_op = _library.register(
    NAME, SCHEMA, _implementation, _fake, lambda x, y: (x, y), save=_save, backward=_backward
)


@flop_formula(torch.ops.resnet_fast.add_relu)
def _flops(*_, **__) -> int:
    """torch counts the operations of products only; an addition counts none."""
    return 0


# 7. The public function: shapes, layouts, errors, an example, the source.
def add_relu(
    x: Tensor,  # any shape
    y: Tensor,  # x's shape
) -> Tensor:
    """relu(x + y) in one pass over memory; NaN passes the ReLU, as in torch. Differentiable.

    Args:
        x, y: floating tensors of one shape, dtype and device. Where both lie in memory in the same
            dense order (both channels_last, say) they are read as they lie.

    Returns:
        A tensor of that shape and dtype, in x's memory order.

    Raises:
        ArgumentError: a ValueError that names the argument, what was expected and what was given.

    Example:
        >>> y = add_relu(torch.randn(1, 64, 56, 56), torch.randn(1, 64, 56, 56))

    Source: He et al. 2015, equation 1 and figure 2 (the addition, then the second ReLU).
    """
    return _op(x, y)
