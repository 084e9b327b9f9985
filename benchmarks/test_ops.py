# SPDX-License-Identifier: Apache-2.0
"""Single ops at the shapes that ResNets have: see test_models.py."""

from __future__ import annotations

SUITE = "ops"


def test_op(replay, case, provider):
    replay(case, provider)
