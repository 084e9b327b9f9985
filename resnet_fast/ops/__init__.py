# SPDX-License-Identifier: Apache-2.0
"""The torch ops, in the namespace `torch.ops.resnet_fast`: start reading at `add_relu.py`.

The narrow waist: above it all is ordinary PyTorch, below it kernels and pointers. Nothing else
calls `dispatch`.
"""

from resnet_fast.kernels.cpu import forget, magnitude, max_pool_3x3_2, packed_bytes
from resnet_fast.ops._library import ArgumentError
from resnet_fast.ops.add_relu import add_relu
from resnet_fast.ops.add_relu import explain as explain_add_relu
from resnet_fast.ops.conv_bn_act import (
    Call,
    conv_bn_act,
    conv_bn_act_,
    conv_bn_act_op,
    conv_bn_act_op_,
    explain,
    last_plan,
    plan_of,
    plans,
    precision,
    reference,
)

__all__ = [
    "ArgumentError",
    "Call",
    "add_relu",
    "conv_bn_act",
    "conv_bn_act_",
    "conv_bn_act_op",
    "conv_bn_act_op_",
    "explain",
    "explain_add_relu",
    "forget",
    "last_plan",
    "magnitude",
    "max_pool_3x3_2",
    "packed_bytes",
    "plan_of",
    "plans",
    "precision",
    "reference",
]
