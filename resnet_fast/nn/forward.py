# SPDX-License-Identifier: Apache-2.0
"""The forwards of blocks, stages and networks: which pieces they are made of, for `run.py`."""

from __future__ import annotations

from torch import Tensor, nn

from resnet_fast.nn import reasons
from resnet_fast.nn.plan import Piece
from resnet_fast.nn.recipes import Family, Fusable, fusable, is_sequence, stem_of
from resnet_fast.nn.run import Chain, run


def block_forward(block: nn.Module, x: Tensor) -> Tensor:
    """A block's forward: fused where nothing speaks against it, else its plain forward.

    Args:
        block: one whose class has a `recipe` and a `_forward_plain`, or that `optimize` changed.
        x: [N, C, H, W]; converted to channels_last here if it is not.
    """

    def chain() -> Chain:
        kind = type(block)
        # None where a subclass overrides forward and came here through super().
        found = fusable(block) or Fusable(kind.recipe, "auto", kind._forward_plain)
        return Chain([Piece(block, found)], [])

    return run(block, "block", chain, x)


def stage_forward(stage: nn.Sequential, x: Tensor) -> Tensor:
    """A stage's blocks, each writing over its predecessor's output.

    That is invisible: the tensor was made here, by a block that was run without calling a hook.
    Whatever is not a fusable block, or has hooks, is called as always.
    """
    return run(stage, "stage", lambda: Chain(list(map(_piece, stage._modules.values())), []), x)


def network_forward(model: nn.Module, x: Tensor, family: Family, backend: str = "auto") -> Tensor:
    """The forward of a network with the children of a family: stem, pool, stages, head.

    Args:
        model: has the family's children, in whatever form a user gave them; those that are not
            what they were are simply called.
        x: [N, C, H, W].
        backend: for the stem; the blocks have their own.
    """

    def chain() -> Chain:
        pool = getattr(model, family.pool) if family.pool else None
        pieces = [Piece(model, stem_of(family.stem, backend), pool, is_stem=True)]
        holders = []
        for stage in (getattr(model, name) for name in family.stages):
            if is_sequence(stage):
                holders.append(stage)
                pieces += map(_piece, stage._modules.values())
            else:
                pieces.append(_piece(stage))
        return Chain(pieces, holders)

    x = run(model, "network", chain, x)
    for part in family.head:
        x = getattr(model, part)(x) if isinstance(part, str) else part(x)
    return x


def stem_forward(owner: nn.Module, x: Tensor, found: Fusable) -> Tensor:
    """What an owner's forward does first, or one of its methods; fused as a block is.

    Args:
        owner: a network.
        x: [N, C, H, W].
        found: the recipe of its stem, and what runs it plain.
    """
    role = "stem", found.recipe.main  # which what an owner collects may change
    return run(owner, role, lambda: Chain([Piece(owner, found, is_stem=True)], []), x)


def _piece(module: nn.Module) -> Piece:
    return Piece(module, None if reasons.has_hooks(module) else fusable(module))
