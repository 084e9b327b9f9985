# SPDX-License-Identifier: Apache-2.0
"""Tables of text: numbers are not cut, words not broken, and what is left out is named."""

from __future__ import annotations

import pytest

from resnet_fast._table import Column, Table, wrapped


def table() -> Table:
    columns = [Column("layer", right=False), Column("ms"), Column("MFLOP", rank=2),
               Column("backend", right=False, rank=1), Column("error")]  # fmt: skip
    found = Table("What was measured", columns, elsewhere="--json has them")
    found.add("conv1", "1.234567", "123456.7", "cpu", "1.46e-06")
    found.add("layer4.2.downsample.0", "0.1", "0.5", "triton", "3.09e-06", style="bold")
    found.add("layer5", text="left out: it is a layer that this model does not have at all")
    return found


@pytest.mark.parametrize("width", [150, 60, 53, 45, 30])
def test_each_number_and_word_is_whole_at_any_width(width):
    whole = " ".join(line.text for line in table().lines()).split()
    lines = [line.text for line in table().lines(width)]
    note = next((i for i, line in enumerate(lines) if line.startswith("left out at")), len(lines))
    words = " ".join(line for line in lines[:note] if set(line) != {"-"}).split()
    assert not [word for word in words if word not in whole]
    assert {"1.234567", "1.46e-06", "3.09e-06", "layer4.2.downsample.0"} <= set(words)


def test_whole_columns_are_left_out_by_rank_and_named():
    def headings(width):
        return table().lines(width)[1].text.split()

    assert headings(None) == ["layer", "ms", "MFLOP", "backend", "error"]
    assert headings(53) == ["layer", "ms", "backend", "error"]
    assert headings(45) == ["layer", "ms", "error"]
    text = " ".join(line.text for line in table().lines(45))
    assert "left out at 45 columns: MFLOP, backend; --json has them" in text.replace("   ", " ")
    assert max(len(line.text) for line in table().lines(45)) <= 45


def test_a_column_without_a_cell_is_no_column():
    found = Table("", [Column("a"), Column("b", rank=1)])
    found.add("1", "")
    assert [line.text for line in found.lines(80)] == ["a", "-", "1"]


def test_a_word_longer_than_the_line_stays_whole():
    path = "/a/very/long/path/that/does/not/fit"
    assert path in wrapped(f"written: {path}", 20)[1]
