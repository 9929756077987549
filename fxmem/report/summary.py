"""An account as plain text of one screen, as rich's tables, and as HTML for notebooks."""

from __future__ import annotations

import html
import itertools
import re
import textwrap
from typing import Any

from .account import Account, Table

WIDTH = 100
GAP = 4
LONGEST = {"storage": 30, "module": 24, "line": 18, "chosen": 24}  # characters, by column title
HTML_STYLE = "border-collapse: collapse; margin: 0 1.5em 1em 0;"


def as_text(account: Account) -> str:
    """At most WIDTH characters a line; tables side by side where they fit."""
    lines = [account.title]
    for name, text in account.facts:
        glued = re.sub(r"(?<=\d) (?=%|[KMG]?B\b|s\b)", "\N{NO-BREAK SPACE}", text)  # no number without its unit
        wrapped = textwrap.wrap(glued, WIDTH, initial_indent=f"{name:<7}", subsequent_indent=" " * 7)
        lines += [line.replace("\N{NO-BREAK SPACE}", " ") for line in wrapped]
    for row in account.tables:
        blocks = [_text_table(table) for table in row]
        beside = len(blocks) > 1 and sum(len(b[0]) for b in blocks) + GAP * (len(blocks) - 1) <= WIDTH
        lines += ["", *(_beside(blocks) if beside else itertools.chain.from_iterable(blocks))]
    return "\n".join(line.rstrip() for line in lines)


def _text_table(table: Table) -> list[str]:
    """Lines of equal length: the title, the columns' titles, the rows."""
    rows = [[_shortened(cell, title) for cell, title in zip(row, table.columns, strict=True)] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(table.columns, *rows, strict=True)]
    lines = [
        "  ".join(f"{cell:{'<' if table.is_text(i) else '>'}{widths[i]}}" for i, cell in enumerate(row))
        for row in (table.columns, *rows)
    ]
    lines = [table.title[:WIDTH], *lines] if table.title else lines
    return [f"{line:<{max(map(len, lines))}}" for line in lines]


def _beside(blocks: list[list[str]]) -> list[str]:
    widths = [len(block[0]) for block in blocks]
    return [
        (" " * GAP).join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        for cells in itertools.zip_longest(*blocks, fillvalue="")
    ]


def _shortened(cell: str, title: str) -> str:
    """Names lose their beginnings: where something happens stands at their ends."""
    most = LONGEST.get(title, WIDTH)
    return cell if len(cell) <= most else f"...{cell[3 - most :]}"


def as_rich(account: Account) -> Any:
    """What `rich.print` shows; only called where rich is installed."""
    from rich.box import SIMPLE_HEAD
    from rich.columns import Columns
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    def rich_table(table: Table) -> RichTable:
        made = RichTable(title=table.title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for i, title in enumerate(table.columns):
            made.add_column(title, justify="left" if table.is_text(i) else "right", no_wrap=not table.is_text(i))
        for row in table.rows:
            made.add_row(*(Text(cell) for cell in row))
        return made

    facts = [Text.assemble((f"{name:<7}", "dim"), text) for name, text in account.facts]
    tables = [Columns([rich_table(table) for table in row], padding=(0, 2)) for row in account.tables]
    return Group(Text(account.title, style="bold"), *facts, *tables)


def as_html(account: Account) -> str:
    """For notebooks: no scripts, no colours of its own, so that it reads in dark and in light."""
    facts = "<br>".join(f"<i>{name}</i> {html.escape(text)}" for name, text in account.facts)
    rows = "".join(
        f'<div style="display: flex; flex-wrap: wrap;">{"".join(map(_html_table, row))}</div>' for row in account.tables
    )
    return f"<b>{html.escape(account.title)}</b><p>{facts}</p>{rows}"


def _html_table(table: Table) -> str:
    def cells(tag: str, row: tuple[str, ...]) -> str:
        sides = ("left" if table.is_text(i) else "right" for i in range(len(row)))
        return "".join(
            f'<{tag} style="text-align: {side};">{html.escape(cell)}</{tag}>' for side, cell in zip(sides, row, strict=True)
        )

    head = f"<tr>{cells('th', table.columns)}</tr>"
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    caption = f'<caption style="text-align: left;"><b>{html.escape(table.title)}</b></caption>' if table.title else ""
    return f'<table style="{HTML_STYLE}">{caption}{head}{body}</table>'
