# SPDX-License-Identifier: Apache-2.0
"""Whole models on real photographs, each provider in its strongest form.

    pytest benchmarks -n 0 [--full]     (-n 0: in one process, or pytest-benchmark times nothing)

Times of one group (model, dtype, batch) belong together: they are of the same rounds.
"""

from __future__ import annotations

SUITE = "models"


def test_model(replay, case, provider):
    replay(case, provider)
