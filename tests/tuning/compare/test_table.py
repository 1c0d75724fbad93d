"""The table of a comparison on a terminal, in a pipe, and its remarks."""

from tests.support.comparison_cases import HEALTH, item, scores
from tuning.compare.ranking import compare
from tuning.compare.table import remarks, table_text


def test_the_table_is_plain_unless_it_goes_to_a_terminal():
    comparison = compare([item("first", 0.3, metrics=scores(0.3) | HEALTH, seconds=125), item("second", 0.1)])
    plain = table_text(comparison, terminal=False)
    assert "\x1b" not in plain and not [line for line in plain.splitlines() if line != line.rstrip()]
    assert "\x1b" in table_text(comparison, terminal=True)
    head, one, other = plain.splitlines()[:3]
    assert " ".join(head.split()) == "no rank run recall@1 codes used agree kappa dead samples time state"
    assert one.split()[:4] == ["1", "1", "first", "30.0%"] and "62%" in one and "0.25" in one and "2.1 min" in one
    assert other.split()[:4] == ["2", "2", "second", "10.0%"] and other.split()[-2] == "–"


def test_equal_reasons_are_told_once():
    items = [item(name, 0.1, status="pruned", reason="halving") for name in "abcd"] + [item("e", 0.2, alarms=["dead"])]
    assert remarks(compare(items)) == ["e: dead", "a, b, c and 1 more: halving"]
