# SPDX-License-Identifier: Apache-2.0
"""The machine is a package of its own: it runs kernels without torch, triton and resnet_fast."""

import pathlib
import subprocess
import sys

from ptx_helpers import HEAD

import softgpu

ABSENT = ("torch", "triton", "resnet_fast", "tests", "benchmarks")
TWICE = f"""{HEAD}
.visible .entry twice(.param .u64 x) {{
    .reg .b32 %r<3>; .reg .b64 %rd<3>;
    ld.param.u64 %rd0, [x];
    mov.u32 %r0, %tid.x;
    mad.wide.u32 %rd1, %r0, 4, %rd0;
    ld.global.u32 %r1, [%rd1];
    add.u32 %r2, %r1, %r1;
    st.global.u32 [%rd1], %r2;
    ret;
}}
"""
PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT}))  # importing them fails
import numpy as np
from softgpu import ptx
x = np.arange(64, dtype=np.uint32)
ptx.Module({TWICE!r}).kernel("twice").launch(1, 64, [x])
assert (x == 2 * np.arange(64)).all()
"""


def test_it_runs_a_kernel_without_any_other_package():
    root = pathlib.Path(softgpu.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
