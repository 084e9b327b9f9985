# SPDX-License-Identifier: Apache-2.0
"""Other people's models: what the table says of them happens, and the results are theirs."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.utils import _pytree as pytree

import resnet_fast
from tests.conversion import zoo

K_GEMM = 2048 * 9


def tensors(y: object) -> list[torch.Tensor]:
    """The floating tensors in a model's output, whatever holds them."""
    leaves = pytree.tree_leaves(y.to_tuple() if hasattr(y, "to_tuple") else y)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


@pytest.mark.parametrize("case", zoo.CASES, ids=str)
def test_the_table(case):
    if not zoo.installed(case):
        pytest.skip(f"{case.library} is not installed")
    model, x = zoo.made(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimized = resnet_fast.optimize(model)
    nothing = [str(w.message) for w in caught if "nothing to fuse" in str(w.message)]
    with torch.inference_mode():
        exact = tensors(copy.deepcopy(model).double()(x.double()))
        eager = tensors(model(x))
        for _ in range(2):
            for mine, plain, reference in zip(tensors(optimized(x)), eager, exact, strict=True):
                verdict = resnet_fast.agreement.compare(mine, plain, reference, K_GEMM)
                assert verdict.agrees, verdict
    report = resnet_fast.report(optimized)
    assert bool(nothing) == (report.fused == 0)
    assert zoo.row_of(case, report) in zoo.TABLE.read_text().splitlines(), str(report)


def test_the_table_has_no_other_rows():
    rows = zoo.TABLE.read_text().partition(zoo.HEAD)[2].splitlines()
    told = [tuple(cell.strip() for cell in row.split("|")[1:3]) for row in rows]
    assert told == [(case.library, case.name) for case in zoo.CASES]
