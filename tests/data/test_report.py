"""The report shows the count, a few rows of each kind, and how many more there are."""

from __future__ import annotations

from ppolite.data.report import Report


def test_lines() -> None:
    report = Report("a.csv", rows=1010, used=1003)
    for row in range(1, 7):
        report.add(row, "'score' is empty", "give a number")
    report.add(9, "'prompt' is empty", "fill it in")
    assert report.lines(most=2) == [
        "a.csv: 1,003 of 1,010 rows used",
        "a.csv row 1: 'score' is empty; give a number",
        "a.csv row 2: 'score' is empty; give a number",
        "a.csv: and 4 more rows of this kind",
        "a.csv row 9: 'prompt' is empty; fill it in",
    ]
