# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite: cases x providers, answers first, then fair rounds, then rows.

cases.py lists what is measured, providers.py by which code (whole models: measuring/peers.py), and
suite.py takes each case through measuring/protocol.py. plan.py says how long it will take, rows.py
keeps the results, changes.py compares two of them, and tables.py shows them.
"""

from resnet_fast.benchmarking.suite import Request, run

__all__ = ["Request", "run"]
