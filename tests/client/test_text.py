"""Text from other users, in tables and messages."""

from hvpd import _text


def test_columns_of_a_table_are_aligned():
    assert _text.table([("NAME", "N"), ("a", "100"), ("longer", "2")]) == ["NAME    N", "a       100", "longer  2"]


def test_a_cell_cannot_break_a_table():
    assert _text.table([("a\nb", "\x1b[2J")]) == ["a\\nb  \\x1b[2J"]


def test_a_text_that_is_cut_says_its_length():
    assert _text.cut("x" * 200, 200) == "x" * 200
    assert _text.cut("x" * 201, 200) == f"{'x' * 200}... (201 characters)"
    assert _text.quoted("it's", 4) == '"it\'s"'
    assert _text.quoted("x" * 201, 200) == f"'{'x' * 200}'... (201 characters)"
