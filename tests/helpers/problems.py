"""Small random joint graphs, with everything that a Problem can hold."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from fxmem.problem import Operator, Problem, Storage


class _Builder:
    def __init__(self, rng: Random):
        self.rng, self.storages, self.operators, self.outputs, self.replaced = rng, [], [], set(), set()

    def storage(self, kind: str, largest: int = 8) -> int:
        self.storages.append(Storage(f"s{len(self.storages)}", self.rng.randint(0, largest), kind))
        return len(self.storages) - 1

    def some(self, items: list[int], most: int) -> list[int]:
        return self.rng.sample(items, min(len(items), self.rng.randint(0, most)))

    def operator(self, name: str, inputs: list[int], outputs: list[int], chance_inplace: float, **more) -> None:
        rng = self.rng
        pairs = [(i, o) for i in inputs for o in outputs if rng.random() < chance_inplace]
        rng.shuffle(pairs)
        workspace_bytes = rng.randint(1, 4) if rng.random() < 0.1 else 0
        self.operators.append(
            Operator(
                name, tuple(inputs), tuple(outputs), float(rng.randint(0, 5)), workspace_bytes, inplace=tuple(pairs), **more
            )
        )


def random_problem(rng: Random, most_forward: int = 5) -> Problem:
    """A joint graph of 2 to `most_forward` forward operators with skips, several outputs, in-place pairs, operators that cannot
    run again, variants, encoders and alternatives (some that only take less memory), workspaces and outputs that live to the
    end."""
    build = _Builder(rng)
    fixed = [build.storage("parameter") for _ in range(2)]
    made: list[int] = []
    for k in range(rng.randint(2, most_forward)):
        inputs = [made[-1]] if made and rng.random() < 0.8 else []
        inputs += [s for s in build.some(made + fixed, 2) if s not in inputs]
        outputs = [build.storage("activation") for _ in range(rng.choice((1, 1, 2)))]
        build.operator(f"f{k}", inputs, outputs, 0.3, recomputable=rng.random() < 0.85)
        build.outputs.update(s for s in outputs if rng.random() < 0.06)
        made += outputs
    num_forward = len(build.operators)
    gradient: list[int] = []
    for k in range(num_forward + rng.randint(0, 1)):
        mirrored = build.operators[max(0, num_forward - 1 - k)]
        near = [s for s in (*mirrored.inputs, *mirrored.outputs) if s in made]
        inputs = gradient + list(dict.fromkeys(build.some(near, 2) + build.some(made if rng.random() < 0.2 else [], 1)))
        outputs = [build.storage("gradient", 3) for _ in range(rng.choice((1, 1, 2)))]
        build.operator(f"b{k}", inputs, outputs, 0.3)
        build.outputs.update(outputs[1:])
        gradient = outputs[:1]
    num_program = len(build.operators)
    for k in range(rng.choice((0, 0, 1, 2))):
        target = rng.choice(made)
        inputs = [s for s in build.some(made + fixed, 2) if s != target]
        build.operator(f"v{k}", inputs, [target], 0.3)
    for k in range(rng.choice((0, 0, 1, 2))):
        _implementation(build, f"{k}", range(num_forward, num_program), made)
    extra_bytes = rng.choice((0, 0, 3))
    for k in range(rng.choice((0, 0, 1, 2))):
        _thrifty(build, f"{k}", range(num_forward, num_program))
    return Problem(
        tuple(build.storages), tuple(build.operators), num_forward, num_program, frozenset(build.outputs), extra_bytes
    )


def _implementation(build: _Builder, name: str, backward: range, made: list[int]) -> None:
    """An encoder of what one forward operator makes, and an alternative that reads the code instead of it."""
    rng = build.rng
    backward = [p for p in backward if set(build.operators[p].inputs) & set(made) and p not in build.replaced]
    if not backward:
        return
    replaced = rng.choice(backward)
    build.replaced.add(replaced)
    operator = build.operators[replaced]
    source = rng.choice([s for s in operator.inputs if s in made])
    code = build.storage("activation", 3)
    build.operator(f"encode{name}", [source], [code], 0.0)
    inputs = [s for s in operator.inputs if s != source] + [code]
    build.operator(f"alternative{name}", inputs, list(operator.outputs), 0.3, replaces=replaced)


def _thrifty(build: _Builder, name: str, backward: range) -> None:
    """Workspace for a backward operator, and an alternative that reads the same and does without."""
    replaced = build.rng.choice(backward)
    operator = replace(build.operators[replaced], workspace_bytes=build.rng.randint(1, 8))
    build.operators[replaced] = operator
    slower_s = operator.time_s + build.rng.randint(0, 3)
    build.operators.append(
        replace(operator, name=f"thrifty{name}", time_s=slower_s, workspace_bytes=0, inplace=(), replaces=replaced)
    )


def chain(length: int, *, size_bytes: int = 10, time_s: float = 1.0) -> Problem:
    """x -> f0 -> f1 -> ... -> loss; the backward of each reads its input and output. Forward and backward cost the same."""
    storages = [Storage("x", size_bytes, "input")]
    storages += [Storage(f"y{k}", size_bytes) for k in range(length)]
    storages += [Storage(f"g{k}", size_bytes, "gradient") for k in range(length + 1)]
    first_gradient = 1 + length
    operators = [Operator(f"f{k}", (k,), (k + 1,), time_s) for k in range(length)]
    operators.append(Operator("loss_backward", (length,), (first_gradient + length,), time_s))
    operators += [
        Operator(f"b{k}", (k, k + 1, first_gradient + k + 1), (first_gradient + k,), time_s) for k in reversed(range(length))
    ]
    return Problem(tuple(storages), tuple(operators), length, len(operators), frozenset({first_gradient}))


def two_gradients(weight_bytes: int) -> Problem:
    """x -> y -> (end); backward: gradient of the input from dy, then that of the weight from dy and x, then one of the input's
    alone. Activations of 10 bytes."""
    sizes = {"w": 1, "x": 10, "dy": 10, "dx": 10, "dw": weight_bytes, "dz": 10}
    names = list(sizes)
    storages = tuple(Storage(name, size, "parameter" if name == "w" else "activation") for name, size in sizes.items())
    steps = {"x": "w", "end": "x", "dy": "x", "dx": "dy", "dw": "dy x", "dz": "dx"}
    operators = tuple(
        Operator(made, tuple(names.index(r) for r in read.split()), (names.index(made),) if made in names else ())
        for made, read in steps.items()
    )
    return Problem(storages, operators, 2, 6, frozenset({names.index("dw"), names.index("dz")}))
