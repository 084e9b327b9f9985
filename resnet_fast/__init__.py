# SPDX-License-Identifier: Apache-2.0
"""Drop-in ResNets that run fused: conv + BatchNorm + ReLU as one kernel, the residual add with it.

    model = resnet_fast.models.resnet50(weights="IMAGENET1K_V2")   # torchvision's builders
    model = resnet_fast.optimize(torchvision_model)                # or convert one
    print(resnet_fast.report(model))                               # what runs fused, and why not
    print(resnet_fast.profile(model, x))                           # where the time goes, and why
    fast = resnet_fast.cuda_graph(model, x)                        # one launch, for latency

The ops themselves are `resnet_fast.ops.conv_bn_act` and `resnet_fast.ops.add_relu`, or
`torch.ops.resnet_fast.*`.
"""

from resnet_fast import models, ops
from resnet_fast.conversion import Report, optimize, refresh, report, restore
from resnet_fast.graphs import cuda_graph
from resnet_fast.nn import disabled

__version__ = "0.1.0"
__all__ = [
    "Profile",
    "Report",
    "cuda_graph",
    "disabled",
    "models",
    "ops",
    "optimize",
    "profile",
    "refresh",
    "report",
    "restore",
]


def __getattr__(name: str) -> object:
    """The profiler, loaded on first use, so that importing the package stays fast."""
    if name in ("Profile", "profile"):
        from resnet_fast.profiling import profile as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
