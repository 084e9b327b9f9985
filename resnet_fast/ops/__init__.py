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
