# SPDX-License-Identifier: Apache-2.0
"""The torch ops, in the namespace `torch.ops.resnet_fast`: start reading at `add_relu.py`.

The narrow waist: above it all is ordinary PyTorch, below it kernels and pointers. Nothing else
calls `dispatch`.
"""

from resnet_fast.dispatch.backends import check_name as check_backend
from resnet_fast.dispatch.backends import devices as backend_devices
from resnet_fast.kernels.cpu import magnitude, max_pool_3x3_2
from resnet_fast.kernels.cuda import architecture_refusal as explain_extension_on
from resnet_fast.kernels.cuda import explain as explain_extension
from resnet_fast.kernels.cuda import missing as explain_extension_missing
from resnet_fast.kernels.cuda import resources as explain_extension_resources
from resnet_fast.kernels.packed import forget, packed_bytes
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
from resnet_fast.ops.conv_bn_join import (
    JoinCall,
    conv_bn_join,
    conv_bn_join_op,
    may_join_in_one_kernel,
)
from resnet_fast.ops.conv_bn_join import explain as explain_join
from resnet_fast.ops.conv_bn_join import last_plan as last_join_plan
from resnet_fast.ops.conv_bn_join import plan_of as plan_of_join
from resnet_fast.ops.stem_pool import BACKENDS as STEM_BACKENDS
from resnet_fast.ops.stem_pool import StemCall, stem_pool, stem_pool_op
from resnet_fast.ops.stem_pool import explain as explain_stem_pool
from resnet_fast.ops.stem_pool import has_kernels as has_stem_kernels
from resnet_fast.ops.stem_pool import last_plan as last_stem_plan
from resnet_fast.ops.stem_pool import plan_of as stem_plan_of
from resnet_fast.ops.stem_pool import reads as stem_reads

__all__ = [
    "STEM_BACKENDS",
    "ArgumentError",
    "Call",
    "JoinCall",
    "StemCall",
    "add_relu",
    "backend_devices",
    "check_backend",
    "conv_bn_act",
    "conv_bn_act_",
    "conv_bn_act_op",
    "conv_bn_act_op_",
    "conv_bn_join",
    "conv_bn_join_op",
    "explain",
    "explain_add_relu",
    "explain_extension",
    "explain_extension_missing",
    "explain_extension_on",
    "explain_extension_resources",
    "explain_join",
    "explain_stem_pool",
    "forget",
    "has_stem_kernels",
    "last_join_plan",
    "last_plan",
    "last_stem_plan",
    "magnitude",
    "max_pool_3x3_2",
    "may_join_in_one_kernel",
    "packed_bytes",
    "plan_of",
    "plan_of_join",
    "plans",
    "precision",
    "reference",
    "stem_plan_of",
    "stem_pool",
    "stem_pool_op",
    "stem_reads",
]
