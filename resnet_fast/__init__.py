# SPDX-License-Identifier: Apache-2.0
"""Drop-in ResNets that run fused."""

__version__ = "0.1.0"
