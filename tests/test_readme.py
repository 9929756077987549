"""The README and the documentation run, and their numbers are those of the stored results."""

import functools
import importlib.util
import re
import shlex
from dataclasses import is_dataclass

import pytest

import fxmem
import fxmem.memory
from benchmarks.report import END, ROOT, pages
from fxmem.__main__ import _parser
from fxmem.implementations import IMPLEMENTATIONS
from fxmem.solvers import SOLVERS

README = (ROOT / "README.md").read_text()
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
BLOCKS = [(page, block) for page in PAGES for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)]


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[page for page, _ in BLOCKS])
def test_python_blocks_run(page, block, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fxmem, "transform", functools.partial(fxmem.transform, time_limit_s=5.0))  # a reader waits longer
    before = dict(IMPLEMENTATIONS), dict(SOLVERS)
    try:
        exec(compile(block, page, "exec"), {})
    finally:
        for registry, entries in zip((IMPLEMENTATIONS, SOLVERS), before, strict=True):
            registry.clear()
            registry.update(entries)
    expected = {
        "README.md": ("budget",),
        "docs/implementations.md": ("relu_pooled  ", "layer_norm_output  ", "is wrong", "accurate "),
        "docs/how-it-works.md": ("def forward(self, boxed_args)",),
        "docs/memory.md": ("1 3072 ((2, 3),) 4\n", "optimal: 4 intervals in 5632 bytes", "trace ("),
        "docs/arena.md": ("arena of ",),
        "docs/coming-from.md": ("planned for that: +",),
        "docs/extending.md": ("added: ",),
        "docs/seeing.md": ("At the peak",),
    }
    printed = capsys.readouterr().out
    assert any(text in printed for text in expected[page])


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page):
    """Commands in shell blocks, and such in the text, are ones that there are."""
    text = (ROOT / page).read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += re.findall(r"`(fxmem (?:demo|plan|frontier|measure|show) [^`]*--[^`]*)`", text)
    for line in lines:
        if line.startswith("fxmem ") and line.count("--help") == 0:
            assert _parser().parse_args(shlex.split(line)[1:]).run
        for module in re.findall(r"python -m (benchmarks\.\w+)", line):
            assert importlib.util.find_spec(module), module


def test_readme_is_short():
    assert README.count("\n") < 150


def test_tables_are_the_results():
    for path, text in pages().items():
        assert path.read_text() == text
        assert text.count(": begin -->") == text.count(END) > 0


def test_ci_runs_the_test_command():
    assert re.findall(r"^pip install .*python -m pytest.*$", README, re.MULTILINE) == [
        'pip install -e ".[test]" && python -m pytest'
    ]


def fields_of(package) -> list[tuple[str, str]]:
    """The public dataclasses of a package that people get back, and their fields and properties."""
    classes = [getattr(package, name) for name in package.__all__ if is_dataclass(getattr(package, name))]
    return [(c.__name__, n) for c in classes for n in vars(c) | c.__annotations__ if not n.startswith("_")]


def test_every_public_name_has_a_word():
    """All that `fxmem`, `fxmem.memory` and `fxmem.passes` offer, down to the fields of what they return, stands in the
    documentation (of passes: in the package's own docstring) as code."""
    code = [found for page in PAGES for found in re.findall(r"`[^`\n]+`|^## .*$", (ROOT / page).read_text(), re.MULTILINE)]
    words = set(re.findall(r"\w+", " ".join(code)))
    names = {*fxmem.__all__, *fxmem.memory.__all__}
    assert names - words == set()
    assert {f"{owner}.{name}" for owner, name in (*fields_of(fxmem), *fields_of(fxmem.memory)) if name not in words} == set()
    assert {*fxmem.passes.__all__} - {"Pass"} == set(re.findall(r"^(\w+)  +\w", fxmem.passes.__doc__, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target
