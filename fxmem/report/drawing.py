"""The graph of a plan, or of one module of it: the forward down the left side, the backward up the right side, every operator
coloured by what becomes of what it makes.

`torch.fx.passes.graph_drawer.FxGraphDrawer` draws the same graphs for Graphviz, without the schedule; for a whole network that
is a picture nobody can read, so this one draws a module at a time, with matplotlib alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import FxmemError
from ..schedule import forward_length
from .axes import AGAIN, IN_PLACE, KEPT, WIDTH_INCHES, legend_below, pyplot, title_of
from .replay import is_recompute, kept_storages

if TYPE_CHECKING:
    from ..decisions import Plan

MOST_STEPS = 64  # that are drawn unasked
ROW_INCHES, LONGEST = 0.3, 40
DROPPED, FREED, RETURNED = "#e3a1b3", "#ffffff", "#949494"
MEANINGS = {
    KEPT: "kept for the backward", DROPPED: "freed, made again later", AGAIN: "runs again", FREED: "freed",
    RETURNED: "returned, or a gradient that stays",
}  # fmt: skip


def draw(plan: Plan, module: str | None = None, axes: Any = None) -> Any:
    """The steps of `module` (a path in the user's model; "" for all) as a graph. Returns the Axes.

    module: None for all where these are at most MOST_STEPS, else for the module of at most that many which recomputes most.
    Raises FxmemError where the plan has no such module.
    """
    picture = _Picture(plan, _module_of_most_recomputes(plan) if module is None else module)
    plt = pyplot()
    if axes is None:
        height = ROW_INCHES * picture.height + 1.4
        axes = plt.subplots(figsize=(WIDTH_INCHES, height), layout="constrained")[1]
    picture.draw_edges(axes)
    picture.draw_boxes(axes)
    where = f" in {picture.module}" if picture.module else ""
    axes.set(
        xlim=(-0.52, 1.52), ylim=(picture.height - 0.3, -0.7), xticks=(0, 1), yticks=(),
        xlabel="phase of the step (time runs down, then up)", title=title_of(plan.model, f"{len(picture.steps)} steps{where}"),
    )  # fmt: skip
    axes.set_xticklabels(("forward, downwards", "backward, upwards"))
    axes.spines[:].set_visible(False)
    patches = [plt.Rectangle((0, 0), 1, 1, facecolor=c, edgecolor="black", label=text) for c, text in MEANINGS.items()]
    patches.append(plt.Rectangle((0, 0), 1, 1, facecolor="white", edgecolor=IN_PLACE, linewidth=2.5, label="runs in place"))
    legend_below(axes, patches, columns=2)
    return axes


def _steps_in(plan: Plan, module: str) -> list[int]:
    """The steps of a module's operators; the end of the forward is no operator of the user's."""
    operators = plan.problem.operators
    return [
        step
        for step, index in enumerate(plan.solution.schedule.steps)
        if index != plan.problem.num_forward - 1 and f"{operators[index].module}.".startswith(f"{module}." if module else "")
    ]


def _module_of_most_recomputes(plan: Plan) -> str:
    if len(_steps_in(plan, "")) <= MOST_STEPS:
        return ""
    again = is_recompute(plan.problem, plan.solution.schedule)
    paths = (operator.module.split(".") for operator in plan.problem.operators)
    modules = dict.fromkeys(".".join(path[:k]) for path in paths for k in range(1, len(path) + 1) if path[0])
    sizes = {module: _steps_in(plan, module) for module in modules}
    fitting = [module for module in modules if len(sizes[module]) <= MOST_STEPS]
    return max(fitting, key=lambda m: (sum(again[s] for s in sizes[m]), len(sizes[m])), default="")


class _Picture:
    """Where each step of a module stands, and what it looks like."""

    def __init__(self, plan: Plan, module: str):
        self.plan, self.module = plan, module
        self.problem, self.schedule, self.timeline = plan.problem, plan.solution.schedule, plan.solution.timeline
        self.steps = _steps_in(plan, module)
        if not self.steps:
            known = ", ".join(sorted({o.module.split(".")[0] for o in self.problem.operators if o.module}))
            raise FxmemError(f"no operator of this plan belongs to a module {module!r}; the outermost modules are: {known}")
        self.again = is_recompute(self.problem, self.schedule)
        self.forward_steps = forward_length(self.problem, self.schedule)
        forward = [s for s in self.steps if s < self.forward_steps]
        backward = [s for s in self.steps if s >= self.forward_steps]
        self.height = max(len(forward), len(backward))
        self.at = {s: (0.0, row * self._stretch(forward)) for row, s in enumerate(forward)}
        self.at |= {s: (1.0, self.height - 1 - row * self._stretch(backward)) for row, s in enumerate(backward)}

    def _stretch(self, steps: list[int]) -> float:
        """Both sides are equally high."""
        return (self.height - 1) / max(1, len(steps) - 1)

    def draw_edges(self, axes: Any) -> None:
        """From the step that makes a storage to each that reads it, before it is made again."""
        made: dict[int, int] = {}
        for step, index in enumerate(self.schedule.steps):
            operator = self.problem.operators[index]
            for storage in operator.inputs:
                source = made.get(storage)
                if source in self.at and step in self.at:
                    self._edge(axes, source, step)
            made.update(dict.fromkeys(operator.outputs, step))

    def _edge(self, axes: Any, source: int, target: int) -> None:
        (x0, y0), (x1, y1) = self.at[source], self.at[target]
        bend = 0.0 if x0 != x1 or abs(y1 - y0) < 1.5 else 0.25
        axes.annotate(
            "", (x1, y1), (x0, y0), zorder=1,
            arrowprops={"arrowstyle": "->", "color": "#5d5d5d", "linewidth": 0.8, "shrinkA": 4, "shrinkB": 7,
                        "connectionstyle": f"arc3,rad={bend}"},
        )  # fmt: skip

    def draw_boxes(self, axes: Any) -> None:
        fates = self._fates()
        for step, (x, y) in self.at.items():
            in_place = self.timeline.inplace[step] is not None
            axes.text(
                x, y, self._label(step), ha="center", va="center", fontsize=7, zorder=2,
                color="white" if fates[step] == AGAIN else "black",
                bbox={"boxstyle": "round,pad=0.3", "facecolor": fates[step], "edgecolor": IN_PLACE if in_place else "black",
                      "linewidth": 2.0 if in_place else 0.6},
            )  # fmt: skip

    def _label(self, step: int) -> str:
        operator = self.problem.operators[self.schedule.steps[step]]
        name = operator.name.lstrip("_").removeprefix(self.module.replace(".", "_") + "_")
        return name if len(name) <= LONGEST else f"...{name[3 - LONGEST :]}"

    def _fates(self) -> dict[int, str]:
        """By step, the colour that says what becomes of what it makes."""
        kept = set(kept_storages(self.problem, self.schedule, self.timeline))
        later = {
            s for step in range(self.forward_steps, len(self.schedule.steps)) if self.again[step]
            for s in self.problem.operators[self.schedule.steps[step]].outputs
        }  # fmt: skip
        return {step: self._fate(step, kept, later) for step in self.at}

    def _fate(self, step: int, kept: set[int], later: set[int]) -> str:
        made = set(self.problem.operators[self.schedule.steps[step]].outputs)
        if self.again[step]:
            return AGAIN
        if made & self.problem.outputs:
            return RETURNED
        if step < self.forward_steps and made & kept:
            return KEPT
        return DROPPED if step < self.forward_steps and made & later else FREED
