# SPDX-License-Identifier: Apache-2.0
"""Drop-in ResNets that run fused: conv + BatchNorm + ReLU as one kernel, the residual add with it.

    model = resnet_fast.models.resnet50(weights="IMAGENET1K_V2")   # torchvision's builders
    model = resnet_fast.optimize(torchvision_model)                # or convert one
    print(resnet_fast.report(model))                               # what runs fused, and why not

The ops themselves are `resnet_fast.ops.conv_bn_act` and `resnet_fast.ops.add_relu`, or
`torch.ops.resnet_fast.*`.
"""

from resnet_fast import models, ops
from resnet_fast.conversion import Report, optimize, refresh, report, restore
from resnet_fast.nn import disabled

__version__ = "0.1.0"
__all__ = [
    "Report",
    "disabled",
    "models",
    "ops",
    "optimize",
    "refresh",
    "report",
    "restore",
]
