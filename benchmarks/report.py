"""Put the tables of the stored results into README.md and docs/benchmarks.md: `python -m benchmarks.report`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable

from .results import FOLDER, Results, load
from .tables import arena_markdown, full_markdown, implementations_markdown, readme_markdown, solvers_markdown, static_markdown

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
    models, instances = FOLDER / "solvers.json", FOLDER / "instances.jsonl"
    rows = json.loads(models.read_text()) if models.exists() else []
    return rows + ([json.loads(line) for line in instances.read_text().splitlines()] if instances.exists() else [])


def implementation_rows() -> list[dict]:
    path = FOLDER / "implementations.json"
    return json.loads(path.read_text()) if path.exists() else []


def static_rows() -> list[dict]:
    path = FOLDER / "static.json"
    return json.loads(path.read_text()) if path.exists() else []


def arena_rows() -> list[dict]:
    path = FOLDER / "arena.json"
    return json.loads(path.read_text()) if path.exists() else []


def pages() -> dict[pathlib.Path, str]:
    """Each page that holds tables, as it should read."""
    memory, arena = ROOT / "docs" / "memory.md", ROOT / "docs" / "arena.md"
    steps, readme, benchmarks = stored(), ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
    implementations = ROOT / "docs" / "implementations.md"
    other = implementations.read_text()
    for part in ("table", "speed", "models", "monet"):
        other = with_tables(
            other, f"benchmarks.implementations, {part}", [implementations_markdown(implementation_rows(), part)]
        )
    page = with_tables(benchmarks.read_text(), "benchmarks.step", map(full_markdown, steps))
    return {
        readme: with_tables(readme.read_text(), "benchmarks.step", map(readme_markdown, steps)),
        benchmarks: with_tables(page, "benchmarks.solvers", [solvers_markdown(solver_rows())]),
        implementations: other,
        memory: with_tables(memory.read_text(), "benchmarks.static", [static_markdown(static_rows())]),
        arena: with_tables(arena.read_text(), "benchmarks.arena", [arena_markdown(arena_rows())]),
    }


def main() -> None:
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
