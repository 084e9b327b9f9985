# SPDX-License-Identifier: Apache-2.0
"""The residual join: relu(x + y). The smallest op, and the guide for the next one.

A new op is this file with another formula (its `Call`, reference, checks, problem and public
function), its kernels, a row for each backend that has it (`dispatch/<backend>.py`), tests that
compare the two, and a line in `ops/__init__.py`. Schema, plans, fakes and explanations are `Op`'s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fast.dispatch.problem import MaskProblem, SumProblem
from resnet_fast.kernels import aten
from resnet_fast.ops._library import describe, dtype_name, reject
from resnet_fast.ops._op import Op, are_aligned, facts, where
from resnet_fast.spec import SumSpec

NAME, BACKWARD = SumProblem.op, MaskProblem.op


class SumCall(NamedTuple):
    """The op's arguments."""

    x: Tensor  # any shape
    y: Tensor  # x's shape


# The checks read no data, so the real and the fake implementation share them.
def check_args(call: SumCall) -> None:
    """Raise ArgumentError unless x and y are dense, alike in shape and dtype, and in one place."""
    x, y = call
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


# What is saved is the output, which the next layer keeps anyway; where it is 0 or less, nothing
# passes.
def _save(ctx, inputs, output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    masked = BACKWARD_OP.overload(grad, *ctx.saved_tensors)
    return masked, masked


class AddRelu(Op):
    """The op; its problem is the number of elements and whether they lie in one memory order."""

    name, Call, Problem = NAME, SumCall, SumProblem
    gradient = (_save, _backward)
    check_args = staticmethod(check_args)

    def reference(self, call: SumCall) -> Tensor:
        return aten.add_relu(*call)

    def output(self, call: SumCall) -> Tensor:
        self.check_args(call)
        first, second = call
        return torch.empty_like(first if first.stride() == second.stride() else first + second)

    def key_of(self, call: SumCall) -> tuple:
        first, second = call
        key = facts(first), facts(second)
        return (*key, are_aligned(first, second)) if first.is_cuda else key

    def spec_of(self, call: SumCall) -> SumSpec:
        return SumSpec(call[0].numel(), dtype_name(call[0].dtype))

    def problem_of(self, call: SumCall) -> SumProblem:
        first, second = call
        nhwc = first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last)
        return self.Problem(
            spec=self.spec_of(call),
            **where(first),
            dense=(first.is_contiguous() or nhwc) and first.stride() == second.stride(),
            aligned=are_aligned(first, second),
        )

    def inputs(self, call: SumCall) -> tuple:
        return call

    def typical(self, dtype: str) -> SumSpec:
        return SumSpec(8 * 56 * 56 * 64, dtype)

    def sample(self, spec: SumSpec, device: torch.device) -> SumCall:
        generator = torch.Generator(device).manual_seed(0)
        size, dtype = (2, spec.numel), getattr(torch, spec.dtype)
        return SumCall(*torch.randn(size, generator=generator, device=device).to(dtype))


class GradCall(NamedTuple):
    """The arguments of the gradient's op."""

    grad: Tensor  # any shape
    y: Tensor  # grad's shape: what add_relu returned


class AddReluBackward(AddRelu):
    """The gradient: an op of its own, so that a traced backward stays whole as well.

    grad where y is not 0 or less, else 0. The mask is linear in grad and the same at every order:
    it is its own gradient.
    """

    name, Call, Problem = BACKWARD, GradCall, MaskProblem
    gradient = (
        lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
        lambda ctx, grad: (BACKWARD_OP.overload(grad, *ctx.saved_tensors), None),
    )

    def reference(self, call: GradCall) -> Tensor:
        return aten.add_relu_backward(*call)

    @staticmethod
    def check_args(call: GradCall) -> None:
        grad, y = call
        if grad.shape != y.shape:
            shape = list(y.shape)
            reject(BACKWARD, "grad", f"of y's shape {shape}", describe(grad), "call .expand_as(y)")
        if grad.dtype != y.dtype:
            dtype = dtype_name(y.dtype)
            remedy = f"call .to(torch.{dtype})"
            reject(BACKWARD, "grad", f"of y's dtype {dtype}", describe(grad), remedy)

    def output(self, call: GradCall) -> Tensor:
        self.check_args(call)
        alike = call.grad.stride() == call.y.stride()
        return torch.empty_like(call.grad) if alike else self.reference(call)


BACKWARD_OP = AddReluBackward()
ADD_RELU = AddRelu()


# The public function: shapes, layouts, errors, an example, the source.
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
    return ADD_RELU.overload(x, y)
