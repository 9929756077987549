"""The README runs, and its numbers are those of the stored results."""

import re

import pytest

from benchmarks.report import END, ROOT, begin, pages

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL), ids=["ten lines"])
def test_python_blocks_run(block, capsys):
    exec(compile(block, "README.md", "exec"), {})
    assert "budget" in capsys.readouterr().out


def test_readme_is_short():
    assert README.count("\n") < 150


def test_tables_are_the_results():
    for path, text in pages().items():
        assert path.read_text() == text and begin("benchmarks.step") in text and END in text


def test_ci_runs_the_test_command():
    assert re.findall(r"^pip install .*python -m pytest.*$", README, re.MULTILINE) == [
        'pip install -e ".[test]" && python -m pytest'
    ]


@pytest.mark.parametrize(
    "page", sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target
