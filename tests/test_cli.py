"""The command line and its demo."""

import sys

import pytest

from fxmem.__main__ import main
from fxmem.errors import MissingExtraError
from fxmem.torchvision_models import load_torchvision


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "4 gigs"], "'4 gigs'"),
        (["--budget", "1.5"], "0 < f <= 1"),
        (["--model", "resnet"], "resnet18"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(options, words, capsys):
    assert main(["demo", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fxmem: ") and error.count("\n") == 1 and words in error


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["demo", "--steps", "0"], ["demo", "--batch", "x"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2 and "usage: fxmem" in capsys.readouterr().err


def test_demo(capsys):
    """Dropout, real data, two optimizers: equal to the last bit; nothing but the account without a terminal."""
    assert main(["demo", "--model", "squeezenet1_1", "--budget", "min", "--steps", "2", "--batch", "4"]) == 0
    shown = capsys.readouterr().out
    assert "All 2 losses, and all 52 parameters and buffers after them, are bitwise equal." in " ".join(shown.split())
    assert "peak, predicted" in shown and "peak, measured" in shown and "training" not in shown


def test_missing_torchvision_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingExtraError, match=r"fxmem\[demo\]"):
        load_torchvision()


def test_torchvision_loads_twice():
    assert load_torchvision() is load_torchvision()
