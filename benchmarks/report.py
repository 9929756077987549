"""Put the tables of the stored results into README.md and docs: `python -m benchmarks.report`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable

from .implementations import WAYS
from .lecture_pictures import names_of
from .results import FOLDER, Results, load, stored_rows
from .tables import (
    arena_markdown,
    full_markdown,
    implementations_markdown,
    lecture_markdown,
    planning_markdown,
    readme_markdown,
    solvers_markdown,
    static_markdown,
    ways_markdown,
)

ROOT = pathlib.Path(__file__).parent.parent
END = "<!-- results: end -->"


def begin(benchmark: str) -> str:
    return f"<!-- results of {benchmark}: begin -->"


def with_tables(page: str, benchmark: str, tables: Iterable[str]) -> str:
    """The text of `page` with what lies between a benchmark's two marks made anew."""
    before, _, rest = page.partition(begin(benchmark))
    _, _, after = rest.partition(END)
    return "\n\n".join([before + begin(benchmark), *tables, END + after])


def stored() -> list[Results]:
    """The results of all devices, by file name."""
    return [load(path) for path in sorted(FOLDER.glob("step-*.json"))]


def solver_rows() -> list[dict]:
    """What `benchmarks.solvers` stored for models, and what it printed for instances (`--json > instances.jsonl`)."""
    instances = FOLDER / "instances.jsonl"
    lines = instances.read_text().splitlines() if instances.exists() else []
    return stored_rows(FOLDER / "solvers.json") + [json.loads(line) for line in lines]


def pages() -> dict[pathlib.Path, str]:
    """Each page that holds tables, as it should read."""
    memory, arena = ROOT / "docs" / "memory.md", ROOT / "docs" / "arena.md"
    steps, readme, benchmarks = stored(), ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
    implementations = ROOT / "docs" / "implementations.md"
    other, found = implementations.read_text(), stored_rows(FOLDER / "implementations.json")
    for part in ("table", "speed", "monet"):
        other = with_tables(other, f"benchmarks.implementations, {part}", [implementations_markdown(found, part)])
    for part in ("planned", "measured"):
        other = with_tables(
            other, f"benchmarks.implementations, {part}", [ways_markdown(found, list(WAYS), part == "measured")]
        )
    page = with_tables(benchmarks.read_text(), "benchmarks.step", map(full_markdown, steps))
    page = with_tables(page, "benchmarks.planning", [planning_markdown(stored_rows(FOLDER / "planning.json"))])
    lecture, memory_page = stored_rows(FOLDER / "lecture.json"), memory.read_text()
    memory_page = with_tables(memory_page, "benchmarks.static", [static_markdown(stored_rows(FOLDER / "static.json"))])
    networks = [lecture_markdown(lecture, network) for network in names_of(lecture, "network")]
    return {
        readme: with_tables(readme.read_text(), "benchmarks.step", map(readme_markdown, steps)),
        benchmarks: with_tables(page, "benchmarks.solvers", [solvers_markdown(solver_rows())]),
        implementations: other,
        memory: with_tables(memory_page, "benchmarks.lecture", networks),
        arena: with_tables(arena.read_text(), "benchmarks.arena", [arena_markdown(stored_rows(FOLDER / "arena.json"))]),
    }


def main() -> None:
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
