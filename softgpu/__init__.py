# SPDX-License-Identifier: Apache-2.0
"""An NVIDIA GPU in software: so far its PTX machine, `softgpu.ptx`. Needs NumPy alone."""
