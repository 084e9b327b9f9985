# SPDX-License-Identifier: Apache-2.0
"""report(model): per block, whether it runs fused, on which backend, and why if it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from resnet_fast import ops
from resnet_fast.conversion import recipes
from resnet_fast.nn import blocks


@dataclass(frozen=True, slots=True)
class Row:
    """One residual block or stem.

    Args:
        name: the module's path in the model; "(stem)" for conv1, bn1 and relu, and for maxpool
            where it runs in the same op: then backend says "with maxpool".
        kind: its class.
        fused: whether it runs fused; for a block that has not run, whether it would.
        backend: what ran it so far, for example "triton" or "triton, aten"; "" before a run.
        reason: why it runs plain, or why some of it runs on the unfused backend "aten".
        fused_calls, plain_calls: how often it ran either way.
        merged: the op that runs several units as one kernel, such as "conv_bn_join"; "" if none.
    """

    name: str
    kind: str
    fused: bool
    backend: str
    reason: str
    fused_calls: int
    plain_calls: int
    merged: str = ""


class Report:
    """The rows of `report`: iterate over it, or print it.

    Args:
        rows: one per residual block and stem.
        packed_bytes: what the CPU's packed copies take beside the live weights.
    """

    def __init__(self, rows: list[Row], packed_bytes: int = 0):
        self.rows, self.packed_bytes = rows, packed_bytes

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_json(self) -> dict:
        """Plain data: dictionaries, lists, strings and numbers."""
        rows = [asdict(row) for row in self.rows]
        return {"fused": self.fused, "packed_bytes": self.packed_bytes, "rows": rows}

    @property
    def fused(self) -> int:
        """How many rows run fused."""
        return sum(row.fused for row in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "resnet_fast: no residual block of a known class in this model"
        head = ("block", "class", "", "backend", "calls", "reason")
        table = [head] + [
            (
                row.name,
                row.kind,
                "fused" if row.fused else "plain",
                row.backend + f" ({row.merged})" * bool(row.merged) or "not run yet",
                f"{row.fused_calls}+{row.plain_calls}",
                row.reason,
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in table]
        summary = f"{self.fused} of {len(self.rows)} fused (calls: fused+plain)"
        if self.packed_bytes:
            summary += f"; packed copies of weights: {self.packed_bytes / 2**20:.1f} MiB"
        return "\n".join(line.rstrip() for line in [*lines, summary])


def report(model: nn.Module, example_input: Tensor | None = None) -> Report:
    """Per residual block of the model: fused or plain, on which backend, and the reason.

    Args:
        model: any model, optimized or not.
        example_input: run the model on it once first, under inference_mode; without it the report
            tells of the runs there have been, and of blocks that have not run, whether they would
            fuse in a call under inference_mode.

    Returns:
        A `Report`: printable, iterable, `report.fused` counts the fused rows.

    Example:
        >>> print(resnet_fast.report(model))
    """
    if example_input is not None:
        with torch.inference_mode():
            model(example_input)
    rows = []
    for name, module in model.named_modules():
        if blocks.fuses_stem(module):
            rows.append(_row(f"{name}.(stem)".lstrip("."), module, blocks.stem_of))
        elif recipes.is_torchvision_resnet(module):
            rows.append(_untouched(f"{name}.(stem)".lstrip("."), module))
        found = blocks.fusable(module)
        if found is not None:
            rows.append(_row(name, module, _examine(found.recipe)))
        elif recipes.recipe_for(module) is not None and "forward" not in module.__dict__:
            rows.append(_untouched(name, module))
        elif recipes.resembles_block(module):
            reason = f"{type(module).__name__}.forward is not one that is known"
            rows.append(Row(name, type(module).__name__, False, "aten", reason, 0, 0))
    return Report(rows, ops.packed_bytes(model.parameters()))


def _examine(recipe: blocks.Recipe):
    return lambda module, x: blocks.parts_of(module, recipe, x)


def _row(name: str, module: nn.Module, examine) -> Row:
    record = blocks.record_of(module)
    reason = record.reason
    if not record.fused and not record.plain:
        reason = _would_refuse(module, examine)
    fused = reason is None
    fallback = "; ".join(f"{why}" for why in record.backends.values() if why)
    names = ", ".join(sorted(record.backends)) if fused else "aten"
    return Row(
        name, type(module).__name__, fused, names, reason or fallback, record.fused, record.plain,
        record.merged if fused else "",
    )  # fmt: skip


def _would_refuse(module: nn.Module, examine) -> str | None:
    conv = module._modules.get("conv1")
    weight = getattr(conv, "weight", None)
    if not isinstance(weight, Tensor):
        return "conv1 has no weight"
    with torch.inference_mode():
        outcome = examine(module, weight.new_empty((1, weight.shape[1], 1, 1)))
    return outcome if isinstance(outcome, str) else None


def _untouched(name: str, module: nn.Module) -> Row:
    reason = "call resnet_fast.optimize(model)"
    return Row(name, type(module).__name__, False, "aten", reason, 0, 0)
