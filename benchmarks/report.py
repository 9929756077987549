"""Put the tables of the stored results into README.md and docs/benchmarks.md: `python -m benchmarks.report`."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable

from .results import FOLDER, Results, load
from .tables import full_markdown, readme_markdown

ROOT = pathlib.Path(__file__).parent.parent
BEGIN, END = "<!-- results of benchmarks.step: begin -->", "<!-- results: end -->"
PAGES: dict[str, Callable[[Results], str]] = {"README.md": readme_markdown, "docs/benchmarks.md": full_markdown}


def with_tables(page: str, table: Callable[[Results], str], results: Iterable[Results]) -> str:
    """The text of `page` with what lies between its two marks made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n\n".join([before + BEGIN, *map(table, results), END + after])


def stored() -> list[Results]:
    """The results of all devices, by file name."""
    return [load(path) for path in sorted(FOLDER.glob("step-*.json"))]


def main() -> None:
    for name, table in PAGES.items():
        path = ROOT / name
        path.write_text(with_tables(path.read_text(), table, stored()))


if __name__ == "__main__":
    main()
