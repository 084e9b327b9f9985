# SPDX-License-Identifier: Apache-2.0
"""An NVIDIA GPU in software: so far the PTX machine, `softgpu.ptx`. Needs only NumPy."""
