# SPDX-License-Identifier: Apache-2.0
"""The command and the parser: what a PTX file holds, and what the machine does not know of it."""

import ast
import pathlib
import sys

import numpy as np
import pytest
from ptx_helpers import HEAD

from softgpu import ptx
from softgpu.ptx.__main__ import main

GOOD = f"""{HEAD}
// a comment with a {chr(123)}
.visible .entry first(.param .u64 p, .param .align 4 .b8 block[12]) .reqntid 32
{{ .reg .b32 %r<4>; .loc 1 2 3
  mov.u32 %r0, %tid.x; /* two
  lines */ {{ .reg .b32 %r<2>; mov.u32 %r1, %r0; again: bra.uni again; }} again: ret; }}
.entry second() {{ ret; }}
"""


def run(tmp_path, capsys, text):
    path = tmp_path / "file.ptx"
    path.write_text(text)
    return main([str(path)]), capsys.readouterr().out


def test_lists_kernels_and_parameters(tmp_path, capsys):
    status, out = run(tmp_path, capsys, GOOD)
    assert status == 0
    for text in ("sm_90a, 2 kernels", "first: 4 instructions .reqntid 32", "p: u64",
                 "block: 12 bytes, aligned to 4", "second: 1 instructions"):  # fmt: skip
        assert text in out


def test_lists_what_is_unsupported(tmp_path, capsys):
    status, out = run(
        tmp_path, capsys, GOOD.replace("bra.uni again;", "frob.u32 %r1;\n frob.u32 %r1;")
    )
    assert status == 1
    assert "unsupported, line 9, 10: unknown instruction frob.u32" in out
    assert main(["no such file"]) == 2


def test_scopes_have_their_own_registers_and_labels():
    text = f"""{HEAD}.visible .entry k(.param .u64 out) {{
    .reg .b32 %r<4>; .reg .b64 %rd<2>; .reg .pred %p;
    ld.param.u64 %rd0, [out]; mov.u32 %r0, 0; mov.u32 %r1, 7;
    {{.reg.b32     %r1; mov.u32 %r1, 100; again: add.u32 %r0, %r0, 1;
       setp.lt.u32 %p, %r0, 3; @%p bra again; }}
    {{ again: add.u32 %r0, %r0, 10; setp.lt.u32 %p, %r0, 30; @%p bra again; }}
    add.u32 %r0, %r0, %r1; st.global.u32 [%rd0], %r0; ret; }}"""
    out = np.zeros(1, np.uint32)
    ptx.Module(text).kernel("k").launch(1, 1, [out])
    assert out[0] == 33 + 7


def test_needs_nothing_but_numpy():
    folder = pathlib.Path(ptx.__file__).parent
    allowed = {*sys.stdlib_module_names, "numpy"}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert {n.split(".")[0] for n in names} <= allowed, path


def test_arguments_must_fit():
    module = ptx.Module(GOOD)
    kernel = module.kernel("first")
    with pytest.raises(ValueError, match="3 arguments for 2 parameters"):
        kernel.launch(1, 32, [0, b"", 1])
    with pytest.raises(ValueError, match="argument 1 has 3 bytes, parameter 12"):
        kernel.launch(1, 32, [0, b"abc"])
    with pytest.raises(TypeError, match="argument 0 is a str"):
        kernel.launch(1, 32, ["x", bytes(12)])
    with pytest.raises(ValueError, match="requires blocks of"):
        kernel.launch(1, 64, [0, bytes(12)])
    with pytest.raises(ValueError, match="not all in the grid"):
        kernel.launch(2, 32, [0, bytes(12)], blocks=[2])
    with pytest.raises(ptx.PtxError, match="kernel 'third' is not in"):
        module.kernel("third")


def test_tensors_are_passed_by_address():
    torch = pytest.importorskip("torch")
    text = f"""{HEAD}.visible .entry k(.param .u64 x, .param .f32 scale, .param .u16 n) {{
    .reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .f32 %f<4>; .reg .b16 %h<4>; .reg .pred %p<2>;
    ld.param.u64 %rd0, [x]; ld.param.f32 %f0, [scale]; ld.param.u16 %h0, [n]; cvt.u32.u16 %r1, %h0;
    mov.u32 %r0, %tid.x; setp.ge.u32 %p0, %r0, %r1; @%p0 ret;
    mad.wide.u32 %rd1, %r0, 2, %rd0; ld.global.b16 %h1, [%rd1]; cvt.f32.bf16 %f1, %h1;
    mul.f32 %f1, %f1, %f0; cvt.rn.bf16.f32 %h1, %f1; st.global.b16 [%rd1], %h1; ret; }}"""
    whole = torch.arange(40, dtype=torch.bfloat16)
    kernel = ptx.Module(text).kernel("k")
    kernel.launch(1, 32, [whole[4:24], 2.0, 20])
    assert whole.tolist() == [*range(4), *(2.0 * i for i in range(4, 24)), *range(24, 40)]
    with pytest.raises(ptx.PtxError, match="out-of-bounds"):
        kernel.launch(1, 32, [whole[4:24], 2.0, 21])


LIMITS = {
    "requires blocks of": (".reqntid 32", "sm_90", 1, 64, 0),
    "at most .64, 1, 1. threads .*got .96": (".maxntid 64, 1, 1", "sm_90", 1, 96, 0),
    "at most 1024 threads": ("", "sm_90", 1, (32, 33), 0),
    "at most .1024, 1024, 64. threads": ("", "sm_90", 1, (1, 1, 65), 0),
    "blocks along x, y, z, got .1, 70000, 1": ("", "sm_90", (1, 70000), 32, 0),
    "blocks along x, y, z, got .1, 1, 65536": ("", "sm_90", (1, 1, 65536), 32, 0),
    "blocks along x, y, z, got .0": ("", "sm_90", 0, 32, 0),
    "at most 232448 bytes of shared memory on sm_90a": ("", "sm_90a", 1, 32, 232449),
    "at most 166912 bytes of shared memory on sm_80": ("", "sm_80", 1, 32, 166913),
    "at most 101376 bytes of shared memory on sm_86": ("", "sm_86", 1, 32, 101377),
    "at most 101376 bytes of shared memory on sm_89": ("", "sm_89", 1, 32, 101377),
    "at most 232448 bytes of shared memory on sm_103a": ("", "sm_103a", 1, 32, 232449),
    "at most 101376 bytes of shared memory on sm_120": ("", "sm_120", 1, 32, 101377),
}


@pytest.mark.parametrize("match", LIMITS)
def test_launches_that_a_gpu_refuses(match):
    directives, target, grid, block, shared = LIMITS[match]
    text = HEAD.replace("sm_90a", target) + f".visible .entry k() {directives} {{ ret; }}"
    kernel = ptx.Module(text).kernel("k")
    with pytest.raises(ValueError, match=f"^k: .*{match}"):
        kernel.launch(grid, block, [], shared)
    if shared:
        kernel.launch(grid, block, [], shared - 1)


def test_clusters_of_several_blocks_are_refused(tmp_path, capsys):
    text = HEAD + ".visible .entry k() .explicitcluster .reqnctapercluster {} {{ ret; }}"
    ptx.Module(text.format("1, 1, 1")).kernel("k").launch(2, 32, [])
    status, out = run(tmp_path, capsys, text.format("2, 1, 1"))
    assert status == 1 and "clusters of (2, 1, 1) blocks are not supported" in out
    kernel = ptx.Module(text.format(2), strict=False).kernel("k")
    with pytest.raises(ptx.PtxError, match="clusters of"):
        kernel.launch(2, 32, [])
