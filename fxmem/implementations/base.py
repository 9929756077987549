"""What an implementation is, and the registry of all of them by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..errors import ImplementationError
from ..torch_internals import OpOverloadPacket

EXACTNESS = ("bitwise", "accurate")


class _Code:
    def __repr__(self) -> str:
        return "CODE"


CODE = _Code()  # among the arguments of a Call: what the implementation's encoder made


@dataclass(frozen=True)
class Call:
    """An operator of the dispatcher, and its arguments: nodes of the graph, plain values, or CODE."""

    target: Any
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Guard:
    """What has to hold of the values of parameters and buffers wherever a Choice runs.

    share_of_limit: a function that is given these tensors, importable by its name, or an object that pickles: the share of a
        limit that the worst of their values uses, as a tensor of one number. Up to 1 the Choice is as accurate as it says.
    tensors: placeholders of the graph.

    The Choice is offered up to `guards.OFFERED_UP_TO`; a step that was planned with it is planned anew where a call finds more
    than `guards.HOLDS_UP_TO`, or NaN.
    """

    share_of_limit: Callable[..., torch.Tensor]
    tensors: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Choice:
    """One more way to run a backward operator.

    backward: runs in its place, and makes the same value; of an operator with a tuple of results, the one that `result` takes
        out, which has to be the only one that is used. encode: makes CODE from what one forward operator makes; None where
    `backward` reads nothing that the graph does not hold anyway. decode: makes an operand of the operator, the node `decoded`,
    again, from CODE or from what is kept anyway. guard: what has to hold of parameters for it.
    """

    backward: Call | None = None
    encode: Call | None = None
    decode: Call | None = None
    decoded: fx.Node | None = None
    result: fx.Node | None = None
    guard: Guard | None = None


@dataclass(frozen=True)
class Result:
    """Among a Rewrite's arguments: one of the results of its operator."""

    index: int


@dataclass(frozen=True)
class Rewrite:
    """Another way to run several operators of the step.

    made: nodes of the step, and what is to stand in the place of each: a Call, or a result of `forward`. A Call that reads one
        of the nodes before it reads what stands in its place. What then nobody reads is gone. forward: where forward and
        backward are written anew together, an operator with a tuple of results that runs in the place of the forward node `at`,
        and is read by `made` as `Result`.

    With a `forward`, the step is planned both ways, and the better plan is taken. Without, the rewrite is always made: offer it
    where it can only be better.
    """

    made: Mapping[fx.Node, Result | Call]
    forward: Call | None = None
    at: fx.Node | None = None


Chooser = Callable[[fx.Node], Choice | Rewrite | Sequence[Choice] | None]


@dataclass(frozen=True)
class Implementation:
    """Another way to write operators' backward, which keeps something else for it; or to run the forward's again.

    name: what users choose it by. serves: targets of the backward nodes (forward: of the forward's) that `choose` is asked
    about; it gives a Choice, a Rewrite, or None where it does not apply; forward: any number of Choices, which decode.
    exactness: "bitwise" (gradients are those of the plain operator, bit for bit) or "accurate". least_bytes: of the
    largest tensor that a node reads or makes, for a Choice to be worth it.
    """

    name: str
    serves: tuple[Any, ...]
    exactness: str
    choose: Chooser
    forward: bool = False
    least_bytes: int = 0


IMPLEMENTATIONS: dict[str, Implementation] = {}


def register_implementation(
    name: str, *serves: Any, exactness: str = "bitwise", forward: bool = False, least_bytes: int = 0
) -> Callable[[Chooser], Chooser]:
    """Decorator for a function that is given a backward node and returns a Choice, a Rewrite, or None where it does not apply.

    serves: targets of the nodes, as in `torch.ops.aten.threshold_backward.default`. forward: it is given nodes of the forward
        instead, and returns a sequence of Choices, each with a `decode`: other ways to run the node again.
    least_bytes: nodes that neither read nor make a tensor as large are passed over, but not by `fxmem.check_implementation`,
        and not for a Rewrite.
    Raises ImplementationError for an unknown exactness, a name that another function has, and what is no operator or no number.
    """
    if not isinstance(name, str) or not name or name.startswith("-"):
        raise ImplementationError(f'{name!r} cannot be chosen by name: give text that does not begin with "-"')
    if exactness not in EXACTNESS:
        raise ImplementationError(f"implementation {name!r} has exactness={exactness!r}; allowed: {', '.join(EXACTNESS)}")
    if not serves:
        raise ImplementationError(f"implementation {name!r} serves no operator: name one or more after its name")
    wrong = [target for target in serves if isinstance(target, OpOverloadPacket) or not callable(target)]
    if wrong:
        raise ImplementationError(
            f"implementation {name!r} serves {wrong[0]!r}, which no node has as its target: name an operator's overload, as in "
            "torch.ops.aten.threshold_backward.default"
        )
    if isinstance(least_bytes, bool) or not isinstance(least_bytes, int) or least_bytes < 0:
        raise ImplementationError(
            f"implementation {name!r} has least_bytes={least_bytes!r}; give bytes, an integer of 0 or more"
        )
    if not isinstance(forward, bool):
        raise ImplementationError(f"implementation {name!r} has forward={forward!r}; it is True or False")

    def register(choose: Chooser) -> Chooser:
        if not callable(choose):
            raise ImplementationError(f"implementation {name!r} is {choose!r}; give a function of a node")
        known = IMPLEMENTATIONS.get(name)
        if known is not None and known.choose.__qualname__ != choose.__qualname__:
            raise ImplementationError(f"there is an implementation {name!r} already; give this one another name")
        IMPLEMENTATIONS[name] = Implementation(name, serves, exactness, choose, forward, least_bytes)
        return choose

    return register


def choose_implementations(names: Collection[str] | None, exactness: str) -> tuple[Implementation, ...]:
    """Those of an exactness: all of them (None), the named ones, or, with names that begin with "-", all but those.

    Raises ImplementationError, with what is known, for what is not.
    """
    if exactness not in EXACTNESS:
        raise ImplementationError(f"exactness={exactness!r} was given; allowed: {', '.join(EXACTNESS)}")
    listed = names is None or (isinstance(names, Collection) and not isinstance(names, str))
    given = list(names or ()) if listed else []
    unknown = [n for n in given if not isinstance(n, str) or n.removeprefix("-") not in IMPLEMENTATIONS]
    if not listed or unknown:
        wrong = f"{unknown[0]!r} is not known" if listed else "give a tuple of names"
        raise ImplementationError(
            f"implementations={names!r}: {wrong}; "
            f'the implementations are: {", ".join(sorted(IMPLEMENTATIONS))}; "-name" leaves one out'
        )
    left_out = {n.removeprefix("-") for n in given if n.startswith("-")}
    asked = {n for n in given if not n.startswith("-")} or set(IMPLEMENTATIONS)
    if names is not None and not given:
        asked = set()
    allowed = EXACTNESS[: EXACTNESS.index(exactness) + 1]
    barred = [n for n in given if not n.startswith("-") and IMPLEMENTATIONS[n].exactness not in allowed]
    if barred:
        raise ImplementationError(
            f"implementations={names!r}: {barred[0]!r} is not bitwise; ask for exactness='accurate' to allow it"
        )
    return tuple(i for n, i in IMPLEMENTATIONS.items() if n in asked - left_out and i.exactness in allowed)
