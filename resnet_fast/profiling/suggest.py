# SPDX-License-Identifier: Apache-2.0
"""What to try, as far as the measured rows tell: one rule a function, all in `RULES`.

A rule speaks only where its threshold is passed, says by which figures, and names what exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from resnet_fast.profiling.findings import Findings

WAITING = 0.15  # of the whole: below that, launches are hidden behind the device's work
SLOW = 0.4  # of the roofline: half of what good kernels reach
LARGE = 0.03  # of the whole: a layer worth a line
BOUND = 0.3  # of the whole in layers that one thing binds: worth to change that
CONVERTING = 0.02  # of the whole spent on changing the layout
WEIGHTS = 0.6  # of the bytes are weights: they would be read once for a whole batch
UNFUSED = 0.05  # of the whole in norms, ReLUs and additions of their own
MOST = 3  # lines of one rule


@dataclass(frozen=True, slots=True)
class Rule:
    """What it looks for, and why that helps.

    Args:
        name: what is suggested.
        reason: why it would help.
        find: the lines for a profile.
    """

    name: str
    reason: str
    find: Callable[[Findings], Iterator[str]]


def suggestions(profile: Findings) -> list[str]:
    """All lines of all rules, the most general first."""
    return [f"{line}: {rule.reason}" for rule in RULES for line in rule.find(profile)]


def _optimize(p: Findings) -> Iterator[str]:
    loose = [row for row in p.rows if row.kind in ("norm", "relu", "add")]
    share = sum(row.share for row in loose)
    if p.unoptimized and share > UNFUSED:
        yield (
            f"{share:.0%} of the time in {len(loose)} norms, ReLUs and additions of their own; "
            "try resnet_fast.optimize(model)"
        )


def _graph(p: Findings) -> Iterator[str]:
    gap = sum(row.share for row in p.rows if row.kind == "gap")
    if not p.device_apart or gap < WAITING:
        return
    waiting = [row for row in p.rows if row.bound == "launch"]
    worst = max(waiting, key=lambda row: row.seconds, default=None)
    where = "" if worst is None else f"{worst.name}: {worst.roof:.0%} of its roofline, "
    yield (
        f"{where}launch-bound at batch {p.batch}, {gap:.0%} of the time the device waits; "
        "try resnet_fast.cuda_graph(model, x)"
    )


def _channels_last(p: Findings) -> Iterator[str]:
    share = sum(row.share for row in p.rows if row.kind == "copy")
    if share > CONVERTING:
        yield f"{share:.0%} of the time in changes of layout; give x in channels_last"
    # The CPU's fused convolutions pack their own copies, whatever the layout.
    if p.contiguous_weights and (p.unoptimized or p.device.startswith("cuda")):
        yield (
            f"{p.contiguous_weights} convolutions have contiguous weights; "
            "try model.to(memory_format=torch.channels_last)"
        )


def _bfloat16(p: Findings) -> Iterator[str]:
    share = sum(row.share for row in p.rows if row.bound == "arithmetic")
    if p.dtype == "float32" and share > BOUND and _has_bfloat16(p.device):
        yield f"{share:.0%} of the time in arithmetic-bound float32 layers; try bfloat16"


def _batch(p: Findings) -> Iterator[str]:
    rows = [row for row in p.rows if row.bound == "memory"]
    moved = sum(row.bytes for row in rows)
    weights = sum(row.weight_bytes for row in rows)
    share = sum(row.share for row in rows)
    if share > BOUND and weights > WEIGHTS * moved:
        yield (
            f"{share:.0%} of the time in memory-bound layers, and {weights / moved:.0%} of their "
            f"bytes are weights; try a batch larger than {p.batch}"
        )


def _tune(p: Findings) -> Iterator[str]:
    slow = [r for r in p.rows if r.backend not in ("", "torch", "aten", "cpu")
            and r.roof < SLOW and r.bound != "launch" and r.share > LARGE]  # fmt: skip
    for row in sorted(slow, key=lambda row: -row.seconds)[:MOST]:
        yield (
            f"{row.name}: {row.roof:.0%} of its roofline, {row.bound}-bound on {row.backend}; "
            "try resnet-fast tune"
        )


def _fallback(p: Findings) -> Iterator[str]:
    loose = [row for row in p.rows if row.why and row.backend == "aten" and row.share > LARGE]
    for row in loose[:MOST]:
        yield f"{row.name}: runs unfused ({row.why})"


def _has_bfloat16(device: str) -> bool:
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    return device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


RULES = (
    Rule("optimize", "fused, they cost no pass over memory", _optimize),
    Rule("cuda_graph", "a graph is launched once for all layers", _graph),
    Rule("channels_last", "the kernels read channels side by side", _channels_last),
    Rule("bfloat16", "matrix units do two to sixteen times as many a second", _bfloat16),
    Rule("batch", "a weight is then read once for several images", _batch),
    Rule("tune", "another tile or backend may be closer to the roofline", _tune),
    Rule("fallback", "a fused kernel would save passes over memory", _fallback),
)
