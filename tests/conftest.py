# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole suite, made before torch is imported."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores already; more threads would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--stress-seconds", type=float, help="how long tests/test_stress.py keeps threads at work"
    )


@pytest.fixture
def needs_cpu_backend():
    """needs_cpu_backend(dtype): skip the test, with the reason, where oneDNN does not run it."""
    from tests.support.here import cpu_refusal

    def ask(dtype) -> None:
        reason = cpu_refusal(dtype)
        if reason is not None:
            pytest.skip(reason)

    return ask
