"""comparison/paper_tables.py: the rows that the paper quotes from other papers."""

from comparison.comparison_table import CITED_PAPER, FOOTNOTES, Row
from comparison.paper_tables import AUGMENTED_ROWS, PAPER_ROWS


def test_each_quoted_row_says_where_its_error_was_looked_up_or_that_it_was_not():
    quoted = [row for row in PAPER_ROWS + AUGMENTED_ROWS if not row.measured]
    assert len(quoted) > 25
    assert [row.network for row in quoted if row.source is None] == []


def test_a_source_with_another_figure_becomes_a_footnote():
    rows = [
        Row(quoted.dataset, quoted.network, quoted.setting, CITED_PAPER, looked_up=quoted.source)
        for quoted in PAPER_ROWS
        if quoted.dataset == "imagenet" and not quoted.measured
    ]
    notes = [note.text(applied) for note in FOOTNOTES if (applied := [row for row in rows if note.applies(row)])]
    [looked_up] = [note for note in notes if note.startswith("Looked up")]
    assert "DARTS, README of github.com/quark0/darts: 26.7" in looked_up and "RegNetX" not in looked_up
    assert any(note.startswith("Not checked") for note in notes)
