# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole suite, made before torch is imported."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores already; more threads would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
