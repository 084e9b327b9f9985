# SPDX-License-Identifier: Apache-2.0
"""The kernels: one file per op, the kernel above the function that launches it."""
