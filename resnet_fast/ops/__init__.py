# SPDX-License-Identifier: Apache-2.0
"""The torch ops, in the namespace `torch.ops.resnet_fast`: start reading at `add_relu.py`.

The narrow waist: above it all is ordinary PyTorch, below it kernels and pointers. Nothing else
calls `dispatch`, but for `tune`, which measures the candidates of its table.
"""

from resnet_fast.dispatch.table import AUTO
from resnet_fast.dispatch.table import check_name as check_backend
from resnet_fast.dispatch.table import devices as backend_devices
from resnet_fast.kernels.cpu import magnitude, max_pool_3x3_2
from resnet_fast.kernels.cuda import architecture_refusal as explain_extension_on
from resnet_fast.kernels.cuda import explain as explain_extension
from resnet_fast.kernels.cuda import missing as explain_extension_missing
from resnet_fast.kernels.cuda import resources as explain_extension_resources
from resnet_fast.kernels.packed import forget, packed_bytes
from resnet_fast.ops._library import ArgumentError
from resnet_fast.ops._op import Op, precision
from resnet_fast.ops.add_relu import ADD_RELU, add_relu
from resnet_fast.ops.conv_bn_act import CONV_BN_ACT, Call, conv_bn_act, conv_bn_act_
from resnet_fast.ops.conv_bn_join import CONV_BN_JOIN, JoinCall, conv_bn_join
from resnet_fast.ops.stem_pool import STEM_POOL, StemCall, stem_pool

OPS: dict[str, Op] = {op.name: op for op in (CONV_BN_ACT, CONV_BN_JOIN, STEM_POOL, ADD_RELU)}

# ---- other names of the ops' attributes, until no caller uses them
conv_bn_act_op, conv_bn_act_op_ = CONV_BN_ACT.overload, CONV_BN_ACT.inplace
conv_bn_join_op, stem_pool_op = CONV_BN_JOIN.overload, STEM_POOL.overload
plan_of, plan_of_join, stem_plan_of = CONV_BN_ACT.plan_of, CONV_BN_JOIN.plan_of, STEM_POOL.plan_of
last_plan, plans, reference = CONV_BN_ACT.last_plan, CONV_BN_ACT.plans, CONV_BN_ACT.reference
last_join_plan, last_stem_plan = CONV_BN_JOIN.last_plan, STEM_POOL.last_plan
explain, explain_join = CONV_BN_ACT.explain, CONV_BN_JOIN.explain
explain_stem_pool, explain_add_relu = STEM_POOL.explain, ADD_RELU.explain
may_join_in_one_kernel, has_stem_kernels = CONV_BN_JOIN.may_fuse, STEM_POOL.may_fuse
stem_reads, STEM_BACKENDS = STEM_POOL.reads, STEM_POOL.backends
# ---- until here

__all__ = [
    "ADD_RELU",
    "AUTO",
    "CONV_BN_ACT",
    "CONV_BN_JOIN",
    "OPS",
    "STEM_POOL",
    "ArgumentError",
    "Call",
    "JoinCall",
    "Op",
    "StemCall",
    "add_relu",
    "backend_devices",
    "check_backend",
    "conv_bn_act",
    "conv_bn_act_",
    "conv_bn_join",
    "explain_extension",
    "explain_extension_missing",
    "explain_extension_on",
    "explain_extension_resources",
    "forget",
    "magnitude",
    "max_pool_3x3_2",
    "packed_bytes",
    "precision",
    "stem_pool",
]
