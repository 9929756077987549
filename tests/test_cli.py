"""The command line and its demo."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

import fxmem
from benchmarks.report import ROOT
from fxmem import demo
from fxmem.__main__ import main
from fxmem.commands import parse_input
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


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["nothing"], ["demo", "--steps", "0"], ["demo", "--batch", "x"], ["plan"], ["plan", "a:b"], ["show"],
        ["frontier", "a:b", "--points", "0"], ["plan", "a:b", "--budget", "min", "--time-limit", "-1"],
        ["plan", "a:b", "--max-overhead", "-1"], ["plan", "a:b", "--max-overhead", "0.1", "--budget", "min"],
    ],
)  # fmt: skip
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2 and "usage: fxmem" in capsys.readouterr().err


def test_demo(capsys, monkeypatch):
    """Dropout, real data, two optimizers: equal to the last bit; nothing but the account without a terminal."""
    monkeypatch.setattr(demo, "SOLVER_SECONDS", 1.0)
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


MODEL = ["helpers.models:ConvNet", "--input", "8,3,16,16", "--time-limit", "0.5"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A plan that the command line has saved."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    assert main(["plan", *MODEL, "--budget", "0.7", "--save", str(path)]) == 0
    return path


def test_a_saved_plan_is_one_to_follow(saved):
    from helpers.models import ConvNet

    planned = fxmem.transform(ConvNet(), (torch.randn(8, 3, 16, 16),), plan=saved)
    assert planned.plan == fxmem.load_plan(saved)
    assert fxmem.measure(planned, (torch.randn(8, 3, 16, 16),), repeats=1).peak_bytes <= planned.plan.budget_bytes


def test_plan_prints_the_account(saved, capsys):
    assert main(["show", str(saved)]) == 0
    assert capsys.readouterr().out == f"{fxmem.load_plan(saved)}\n"


def test_plan_in_numbers(capsys):
    assert main(["plan", *MODEL, "--budget", "min", "--device-model", "H100", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["cost"] == "H100" and numbers["predicted_peak_bytes"] < numbers["baseline_peak_bytes"]
    assert sum(numbers["peak_by_kind"].values()) == numbers["predicted_peak_bytes"]


def test_plan_for_an_overhead(capsys):
    assert main(["plan", *MODEL, "--max-overhead", "0", "--device-model", "H100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted_overhead"] == 0 and found["predicted_peak_bytes"] <= found["baseline_peak_bytes"]


def test_inputs_by_name(capsys):
    ids = ["--input", "2,8:int64", "--input", "labels=2,8:int64"]
    assert main(["plan", "helpers.models:Transformer", *ids, "--budget", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predicted_overhead"] == 0


def test_frontier_with_a_peer(tmp_path, capsys):
    picture = tmp_path / "frontier.png"
    options = ["--points", "3", "--peers", "chen_sqrt", "--plot", str(picture), "--json"]
    assert main(["frontier", *MODEL, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    peaks = [plan["predicted_peak_bytes"] for plan in found["plans"]]
    assert peaks == sorted(peaks, reverse=True) and list(found["peers"]) == ["chen_sqrt"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_show_draws(saved, tmp_path, capsys):
    names = {"timeline": "a.png", "schedule": "b.svg", "graph": "c.png", "memory-map": "d.png", "snapshot": "e.html"}
    options = [part for what, name in names.items() for part in (f"--{what}", str(tmp_path / name))]
    assert main(["show", str(saved), "--json", *options]) == 0
    assert all((tmp_path / name).stat().st_size > 1000 for name in names.values())


def test_the_commands_of_the_documentation_run(tmp_path, monkeypatch, capsys):
    """One after the other, as they stand there, on a small model; the demo has a test of its own."""
    (block,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "seeing.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        small = (
            line.replace("torchvision.models:resnet50", "helpers.models:ConvNet")
            .replace("3,224,224", "3,16,16")
            .replace("--budget 0.5", "--budget 0.7")
        )
        _, command, *options = shlex.split(small)
        if command != "demo":
            assert main([command, *options, *(["--time-limit", "0.5"] if command != "show" else [])]) == 0
    made = {"plan.json", "timeline.png", "arena.png", "snapshot.pickle", "frontier.png"}
    assert {path.name for path in tmp_path.iterdir()} == made and "planned, predicted" in capsys.readouterr().out


def test_measure(saved, capsys):
    model = [*MODEL[:3], "--repeats", "1"]
    assert main(["measure", *model]) == 0
    assert capsys.readouterr().out.startswith("plain ")
    assert main(["measure", *model, "--plan", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    predicted = found["planned, predicted"]["predicted_peak_bytes"]
    assert found["planned"]["peak_bytes"] <= predicted < found["plain"]["peak_bytes"]


def broken():
    raise ValueError("no weights\nhere")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "nothing", "--budget", "min"], "named as MODULE:FACTORY"),
        (["plan", "no_such_module:make", "--budget", "min"], "'no_such_module' cannot be imported (ModuleNotFoundError"),
        (["plan", "helpers.models:Nothing", "--budget", "min"], "'helpers.models' has no 'Nothing'"),
        (
            ["plan", "test_cli:broken", "--budget", "min"],
            "fails when it is called without arguments: ValueError: no weights here",
        ),
        (["plan", "builtins:dict", "--budget", "min"], "makes a dict; it must make a torch.nn.Module"),
        (["plan", *MODEL[:2], "8x3", "--budget", "min"], "--input '8x3' does not parse"),
        (["plan", *MODEL[:2], "8,3:float99", "--budget", "min"], "--input '8,3:float99' does not parse"),
        (["plan", *MODEL[:2], "8,3:nn", "--budget", "min"], "does not parse"),
        (["plan", *MODEL[:1], "--budget", "min"], "the example inputs do not fit ConvNet.forward"),
        (["plan", *MODEL[:2], "8,4,16,16", "--budget", "min"], "ConvNet"),
        (["plan", *MODEL, "--budget", "much"], "budget='much' was given"),
        (["plan", *MODEL, "--budget", "1KB"], "the least peak that is reached"),
        (["plan", *MODEL, "--budget", "0.7", "--solver", "magic"], "unknown solver 'magic'"),
        (["plan", *MODEL, "--budget", "min", "--device-model", "abacus"], "unknown --device-model 'abacus'"),
        (["plan", *MODEL, "--budget", "min", "--device-model", "H100", "--measured"], "cannot be timed"),
        (["plan", *MODEL, "--budget", "min", "--device", "tpu"], "--device tpu cannot be used"),
        (["plan", *MODEL, "--budget", "none", "--save", "/proc/no/plan.json"], "cannot be written"),
        (["frontier", *MODEL, "--peers", "magic"], "unknown solver 'magic'"),
        (["measure", *MODEL, "--budget", "min", "--plan", "plan.json"], "leave one out"),
        (["show", "no_such_plan.json"], "cannot be read: No such file"),
        (["show", __file__], "is no plan, or not a whole one"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fxmem: ") and error.count("\n") == 1 and words in error


def test_missing_matplotlib_is_one_line(saved, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert main(["show", str(saved), "--timeline", "a.png"]) == 2
    assert (
        capsys.readouterr().err == 'fxmem: matplotlib is not installed: pip install "fxmem[plot]" brings what pictures need\n'
    )


def test_pictures_that_cannot_be_written(saved, capsys):
    assert main(["show", str(saved), "--timeline", "/proc/no/a.png"]) == 2
    assert main(["show", str(saved), "--timeline", "a.nothing"]) == 2
    assert capsys.readouterr().err.count("cannot be written") == 2


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("32,3,224,224", ("", (32, 3, 224, 224), torch.float32)),
        ("2,512:int64", ("", (2, 512), torch.int64)),
        ("labels=2,512:int64", ("labels", (2, 512), torch.int64)),
        ("scale=:float64", ("scale", (), torch.float64)),
        ("4, 3", ("", (4, 3), torch.float32)),
    ],
)
def test_input_specs(spec, expected):
    assert parse_input(spec) == expected


def test_what_nobody_foresaw_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr("fxmem.commands.load_plan", lambda path: 1 / 0)
    assert main(["show", "plan.json"]) == 2
    assert capsys.readouterr().err == "fxmem: ZeroDivisionError: division by zero (--verbose shows where)\n"
    assert main(["show", "plan.json", "--verbose"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_who_has_seen_enough(saved):
    """`fxmem show plan.json | head -0`: nothing on stderr."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fxmem", "show", str(saved)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("command", [[], ["demo"], ["plan"], ["frontier"], ["measure"], ["show"]])
def test_help_has_examples(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0 and f"examples:\n  fxmem {' '.join(command)}" in capsys.readouterr().out


def test_help_and_version_load_no_torch():
    code = "import sys; from fxmem.__main__ import main\ntry: main(['--version'])\nfinally: assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == f"fxmem {fxmem.__version__}\n"
