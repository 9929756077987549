"""The command line: `python -m fxmem`, or `fxmem` where the package is installed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .budget import budget_from_text
from .errors import FxmemError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand in `argv`. Returns the exit code: 0, or 2 after one line on stderr for what the user can mend."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except FxmemError as error:
        print(f"fxmem: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fxmem", description="Train PyTorch models under a memory budget that holds.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a MobileNetV2 on real data, plain and planned side by side",
        description="Trains a model of torchvision's on scikit-learn's digits twice from the same start, as it is and planned "
        "by fxmem, and prints the peaks, predicted and measured, the times, and whether the losses are equal bit for bit.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--model", default="mobilenet_v2", help="a classifier by its name in torchvision.models")
    demo.add_argument("--budget", default="0.4", help="peak: a fraction of the plain one, bytes, 300MiB, min or none")
    demo.add_argument("--steps", type=_positive, default=16, help="training steps of each")
    demo.add_argument("--batch", type=_positive, default=32, help="images in a step")
    demo.add_argument("--device", default="cpu", help="where to train: cpu or cuda")
    demo.set_defaults(run=_demo)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import run  # needs the extra

    run(arguments.model, budget_from_text(arguments.budget), arguments.steps, arguments.batch, arguments.device)
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} was given; it must be one or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
