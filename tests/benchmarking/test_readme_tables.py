# SPDX-License-Identifier: Apache-2.0
"""The README's tables show what one run measured, mark what is not stable, and claim no more."""

from __future__ import annotations

from benchmarks import readme
from resnet_fast.benchmarking.rows import Results
from resnet_fast.measuring.steadiness import MARK, NOTE
from tests.benchmarking.fakes import row
from tests.benchmarking.test_report import results, unstable
from tests.benchmarking.test_rows import EAGER


def test_the_readmes_table_has_what_was_measured_and_nothing_else():
    found = results()
    table = readme.ratios(found)
    assert table.splitlines()[0].startswith(
        "| model | dtype | batch | torchvision at its best (ms) | resnet_fast | openvino |"
    )
    assert "| resnet18 | float32 | 1 | 20.0 | 0.65 | 0.60 |" in table
    assert "script" not in table and "Test Processor" in table
    # A provider without a time in one of the cases has a dash there.
    del found.rows[1]
    assert "| resnet18 | float32 | 1 | 20.0 | 0.65 | - |" in readme.ratios(found)
    assert readme.ratios(Results()) == "No model was measured."


def test_the_table_marks_what_is_not_stable_and_says_what_the_mark_means():
    table = readme.ratios(unstable())
    assert "| 20.0 | ~0.65 | ? |" in table and NOTE in table
    assert NOTE not in readme.ratios(results()) and MARK not in readme.ratios(results())
    assert "~13.0 (10.4 to 15.6)" in readme.times(unstable())


def test_a_sentence_over_the_table_counts_its_cells():
    ours = [row("resnet_fast", ms, batch=batch) for batch, ms in ((1, 10.0), (8, 90.0))]
    eager = [row(EAGER, ms, batch=batch) for batch, ms in ((1, 20.0), (8, 160.0))]
    peer = [row("compile", 9.0, batch=1), row("compile", 91.0, batch=8)]
    said = readme.ratios(Results(rows=[*ours, *eager, *peer, row("openvino", 5.0, batch=1)]))
    assert f"than {EAGER} in 2 of 2 rows, than compile in 1 of 2 rows" in said


def test_both_tables_are_of_one_run():
    """A ratio of the one is that of two medians of the other."""
    assert readme.TABLES["benchmarks/readme.py"]() == readme.ratios(readme.rows.read(readme.RUN))
    assert readme.TABLES["bench"]() == readme.times(readme.rows.read(readme.RUN))


def test_the_base_is_torchvisions_faster_form_in_each_row():
    forms = [row(name, ms) for name, ms in (("torchvision-contiguous", 8.0), (EAGER, 20.0))]
    assert "| 8.0 | 1.25 |" in readme.ratios(Results(rows=[*forms, row("resnet_fast", 10.0)]))
