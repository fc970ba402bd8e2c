"""Small HTML tables for notebooks.

All text is escaped, because names come from other tenants. Colours and fonts are the
notebook's own, so that tables can be read in dark notebooks, too.
"""

import html
from collections.abc import Iterable, Mapping, Sequence

from hvpd import _text

_LONGEST = 200
"""Most characters of a cell."""

_LEFT = "text-align: left"
"""Style of a cell: notebooks align to the right, which suits numbers, not words."""


def facts(title: str, facts: Mapping[str, object]) -> str:
    """Return a table with a row for each fact; leave facts out whose text is empty."""
    rows = (f"<tr>{_cell('th', name)}{_cell('td', fact)}</tr>" for name, fact in facts.items() if str(fact))
    return _table(title, rows)


def grid(title: str, rows: Sequence[Sequence[object]], note: str = "") -> str:
    """Return a table whose first row has the headings, with a note below it."""
    headings, *others = rows
    lines = ["".join(_cell("th", cell) for cell in headings)]
    lines += ["".join(_cell("td", cell) for cell in row) for row in others]
    return _table(title, (f"<tr>{line}</tr>" for line in lines), note)


def _table(title: str, rows: Iterable[str], note: str = "") -> str:
    # Otherwise notebooks would read text between dollar signs as TeX, which has links.
    return (
        f'<div class="tex2jax_ignore mathjax_ignore"><table><caption style="{_LEFT}">{_escaped(title)}</caption>'
        f"{''.join(rows)}</table>{f'<p>{_escaped(note)}</p>' if note else ''}</div>"
    )


def _cell(tag: str, content: object) -> str:
    return f'<{tag} style="{_LEFT}">{_escaped(str(content))}</{tag}>'


def _escaped(text: str) -> str:
    return html.escape(_text.cut(_text.printable(text), _LONGEST))
