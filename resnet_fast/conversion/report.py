# SPDX-License-Identifier: Apache-2.0
"""report(model): per block, whether it runs fused, on which backend, and why if it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from resnet_fast import ops
from resnet_fast.conversion.find import Owner, kind_of, left_over, owners
from resnet_fast.nn import parts, reasons
from resnet_fast.nn.run import record_of

UNFUSED = "aten"  # the backend that runs an op's steps one after the other
ASKED = "backend aten was asked for, which fuses nothing"


@dataclass(frozen=True, slots=True)
class Entry:
    """One residual block, stem, or convolution with its norm; or what was left and resembles one.

    Args:
        name: the module's path in the model; "(stem)" for conv1, bn1 and relu, and for maxpool
            where it runs in the same op: then backend says "with maxpool".
        kind: its class.
        fused: whether fused kernels run it, or a part of it; for what has not run, whether they
            would.
        backend: what ran it so far, for example "triton" or "triton, aten"; "" before a run.
        reason: why it runs plain; or what of it does, be it as a module that is called or on the
            backend "aten", which takes an op's steps one after the other.
        fused_calls, plain_calls: how often it ran either way.
        merged: the op that runs several units as one kernel; "" if none did.
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

    def __init__(self, rows: list[Entry], packed_bytes: int = 0):
        self.rows, self.packed_bytes = rows, packed_bytes

    def __iter__(self) -> Iterator[Entry]:
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
            return "resnet_fast: nothing in this model looks as if it could be fused"
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
    found = owners(model)
    rows = [row for row in map(_entry, found) if row is not None]
    rows += [
        Entry(name or "(model)", kind_of(module), False, "aten", reason, 0, 0)
        for name, module, reason in left_over(model, found)
    ]
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    rows.sort(key=lambda row: order.get(row.name.removesuffix("(stem)").rstrip("."), 0))
    return Report(rows, ops.packed_bytes(model.parameters()))


def _entry(owner: Owner) -> Entry | None:
    """An owner's line; None for one that ran, if at all, as part of another."""
    record = record_of(owner.module)
    ran = record.fused + record.plain
    if owner.inner and not record.fused:
        return None
    reason, left = record.reason, record.left
    if not owner.installed and owner.convs:
        reason = "call resnet_fast.optimize(model)"
    elif not ran:
        reason, left = _foretell(owner)
    ran_by = dict(record.backends)  # another thread may add one
    unfused = "; ".join(dict.fromkeys(why for why in ran_by.values() if why))
    calls = record.fused, record.plain
    if reason is None and ran_by and all(map(_is_unfused, ran_by)):
        reason, calls = unfused, (0, ran)
    fused = reason is None
    return Entry(
        owner.name, type(owner.module).__name__, fused,
        ", ".join(sorted(ran_by)) if fused else UNFUSED,
        reason or "; ".join(filter(None, (left, unfused))),
        *calls, record.merged if fused else "",
    )  # fmt: skip


def _is_unfused(backend: str) -> bool:
    return backend.split()[0] == UNFUSED  # the stem's may be "aten with maxpool"


def _foretell(owner: Owner) -> tuple[str | None, str]:
    """Why an owner would run plain in a call under inference_mode, and what it would leave."""
    convs = owner.convs or [m for m in owner.module.modules() if isinstance(m, nn.Conv2d)]
    weight = getattr(convs[0], "weight", None) if convs else None
    if not isinstance(weight, Tensor):
        return "it has no convolution with a weight", ""
    with torch.inference_mode():
        # Only its shape is looked at.
        x = weight.new_empty(1).expand(1, weight.shape[1] * convs[0].groups, 64, 64)
        refusal = reasons.context_refusal(x)
        outcome = refusal or parts.parts_of(owner.module, owner.recipe, x)
        if isinstance(outcome, str):
            return outcome, ""
    role = getattr(type(owner.module), "_role", None)
    asked = role is not None and role.backend == UNFUSED
    chosen, whys = ops.CONV_BN_ACT.explain(
        weight.device.type, str(weight.dtype).removeprefix("torch.")
    )
    here = (why for why in whys.values() if not why.startswith("runs on "))
    unfused = (asked and ASKED) or (chosen == UNFUSED and "; ".join(dict.fromkeys(here)))
    return unfused or None, outcome.left
