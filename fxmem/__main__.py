"""The command line: `python -m fxmem`, or `fxmem` where the package is installed."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence

from .errors import FxmemError
from .version import VERSION

log = logging.getLogger("fxmem")

EXAMPLES = """examples:
  fxmem demo
  fxmem plan torchvision.models:resnet50 --input 32,3,224,224 --budget 4GiB --device-model H100
  fxmem plan my_package.model:make --input 2,512:int64 --input labels=2,512:int64 --budget 0.5 --save plan.json
  fxmem show plan.json --timeline timeline.png --memory-map arena.png --snapshot snapshot.pickle
  fxmem frontier torchvision.models:resnet50 --input 8,3,224,224 --points 6 --peers rotor,checkmate_lp --plot frontier.png
  fxmem measure torchvision.models:resnet18 --input 8,3,224,224 --budget 0.5

`fxmem COMMAND --help` tells more."""
FACTORY = """MODULE:FACTORY names something that makes the model when it is called without arguments (a function or a class;
dots lead into it), importable from here: torchvision.models:resnet50. --input gives one argument of the model's, in
order: its shape, then its type if that is not float32 (2,512:int64), with a name if it goes by keyword
(labels=2,512:int64)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand in `argv`. Returns the exit code: 0; 2 after one line on stderr for what the user can mend; 130 when
    interrupted; 141 when whoever reads the output stops."""
    arguments = _parser().parse_args(argv)
    with _logging(arguments.verbose):
        try:
            code = arguments.run(arguments)
            sys.stdout.flush()
            return code
        except FxmemError as error:
            return _failed(str(error))
        except KeyboardInterrupt:
            print("fxmem: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # whoever reads has seen enough, as `head` does; what is left goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except Exception as error:  # whatever it is, the terminal shows one line; --verbose shows where
            log.debug("traceback", exc_info=True)
            return _failed(f"{type(error).__name__}: {error} (--verbose shows where)")


def _failed(message: str) -> int:
    print(f"fxmem: {' '.join(message.split())}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def _logging(verbose: bool):
    """With --verbose, what fxmem logs goes to stderr."""
    if not verbose:
        yield
        return
    handler, level = logging.StreamHandler(), log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxmem", description="Train PyTorch models under a memory budget that holds.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"fxmem {VERSION}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _demo_options(_command(commands, "demo", "train a model on real data, plain and planned side by side"))
    _plan_options(_command(commands, "plan", "plan a model's training step for a budget", FACTORY))
    _frontier_options(_command(commands, "frontier", "plan a model for several budgets, from plain to the least peak", FACTORY))
    _measure_options(_command(commands, "measure", "run a model's training step, and find its peak and time", FACTORY))
    _show_options(_command(commands, "show", "print a saved plan, and draw it"))
    return parser


def _command(commands, name: str, what: str, more: str = "") -> argparse.ArgumentParser:
    """A subparser that runs `fxmem.commands.<name>`; only then is torch imported."""

    def run(arguments: argparse.Namespace) -> int:
        from . import commands as functions

        getattr(functions, name)(arguments)
        return 0

    examples = "\n".join(["examples:", *(line for line in EXAMPLES.splitlines() if line.startswith(f"  fxmem {name}"))])
    parser = commands.add_parser(
        name, help=what, description=f"{what[0].upper()}{what[1:]}.\n\n{more}".rstrip(), epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="log what happens, and where errors come from, on stderr")
    parser.set_defaults(run=run)
    return parser


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="mobilenet_v2", help="a classifier by its name in torchvision.models (%(default)s)")
    parser.add_argument(
        "--budget", default="0.4", help="peak: a fraction of the plain one, bytes, 300MiB, min or none (%(default)s)"
    )
    parser.add_argument("--steps", type=_positive, default=16, help="training steps of each (%(default)s)")
    parser.add_argument("--batch", type=_positive, default=32, help="images in a step (%(default)s)")
    parser.add_argument("--device", default="cpu", help="where to train: cpu or cuda (%(default)s)")


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("factory", metavar="MODULE:FACTORY", help="what makes the model")
    parser.add_argument("--input", action="append", default=[], metavar="SPEC", help="an argument's shape, as in 32,3,224,224")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--time-limit", type=_seconds, default=30.0, metavar="S", help="seconds to solve (%(default)s)")


def _planning_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device-model", metavar="NAME", help="plan for a device that is not here: P100, V100, A100, H100, H200"
    )
    parser.add_argument("--device", default="cpu", help="otherwise, the device that the model will be on (%(default)s)")
    parser.add_argument("--measured", action="store_true", help="time every operator there instead of estimating")


def _plan_options(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    _planning_options(parser)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--budget", help="peak: 4GiB, bytes, a fraction of the plain one, min or none")
    asked.add_argument(
        "--max-overhead", type=_overhead, metavar="X", help="or the least peak at this extra time: 0.1 is ten percent"
    )
    parser.add_argument("--solver", default="auto", help="which solver (%(default)s)")
    parser.add_argument("--save", metavar="FILE", help='keep the plan, for `fxmem show` and transform(..., plan="FILE")')


def _frontier_options(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    _planning_options(parser)
    parser.add_argument("--points", type=_positive, default=8, help="how many budgets (%(default)s)")
    parser.add_argument("--peers", default="", metavar="NAMES", help="other methods to stand beside, as in rotor,checkmate_lp")
    parser.add_argument("--plot", metavar="FILE", help="draw peak against time, as in frontier.png")


def _measure_options(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    parser.add_argument("--device", default="cpu", help="where to run: cpu or cuda (%(default)s)")
    parser.add_argument("--budget", help="plan the model for this budget, and measure that too")
    parser.add_argument("--plan", metavar="FILE", help="instead of a budget, a saved plan to follow")
    parser.add_argument("--repeats", type=_positive, default=3, help="steps that are timed (%(default)s)")


def _show_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", metavar="PLAN", help="what `fxmem plan --save` or `Plan.save` wrote")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--timeline", metavar="FILE", help="draw memory over the step, as in timeline.png")
    parser.add_argument("--schedule", metavar="FILE", help="draw operators over time")
    parser.add_argument("--memory-map", metavar="FILE", help="draw where each buffer would lie in an arena")
    parser.add_argument("--graph", metavar="FILE", help="draw the module that recomputes most")
    parser.add_argument(
        "--snapshot",
        metavar="FILE",
        help="write the timeline for pytorch.org/memory_viz: .pickle, or a page that fetches the viewer: .html",
    )


def _number(kind: Callable, least: float, text: str, words: str):
    try:
        number = kind(text)
    except ValueError:
        number = None
    if number is None or not least <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} was given; it must be {words}")
    return number


def _positive(text: str) -> int:
    return _number(int, 1, text, "one or more")


def _overhead(text: str) -> float:
    return _number(float, 0, text, "zero or more")


def _seconds(text: str) -> float:
    return _number(float, 0, text, "zero or more seconds")


if __name__ == "__main__":
    sys.exit(main())
