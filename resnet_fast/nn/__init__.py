# SPDX-License-Identifier: Apache-2.0
"""Ordinary modules run fused: a network becomes a plan of ops.

Reading order, each file resting on those before it:

    units.py     a convolution with its BatchNorm, and the op that it runs as
    reasons.py   why something may not be fused, in words
    recipes.py   which names the parts of a block and of a network have
    parts.py     what an instance holds under those names, and what of it can be fused
    plan.py      parts -> steps over three slots; the largest kernel first
    guard.py     the facts that a kept plan rests on, compared once a forward
    launches.py  what runs each step of a kept plan
    run.py       a plan is recalled, or made, and followed
    forward.py   the forwards of blocks, stages and networks
"""

from resnet_fast.nn.reasons import disabled

__all__ = ["disabled"]
