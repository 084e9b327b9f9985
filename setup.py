# SPDX-License-Identifier: Apache-2.0
"""Installs pure Python: no compiler and no torch are needed here. All else is in pyproject.toml."""

from setuptools import setup

setup()
