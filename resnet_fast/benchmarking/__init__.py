# SPDX-License-Identifier: Apache-2.0
"""The benchmark suite: cases x providers, answers first, then fair rounds, then rows.

cases.py what is measured, providers.py who does it, protocol.py how, suite.py all of it in turn;
rows.py keeps results, compare.py holds two runs against each other, report.py makes the page.
"""

from resnet_fast.benchmarking.suite import Request, run

__all__ = ["Request", "run"]
