"""One denoise step -> the decoder: all steps in one graph, as a loop or one after the other.

Both take the exported step `x, step -> x_next` to a graph `noise -> actions`, and leave what depends on
neither `x` nor `step` outside, where it runs once: the masks, the rotary angles, the rows of frozen actions,
pi0's state token. Weights are shared by all steps.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import onnx_ir as ir

from otau.toolchain.graph.weights import fresh_name

__all__ = ["LoopDenoiseSteps", "UnrollDenoiseSteps"]


@dataclass(frozen=True)
class _Step:
    """What changes from step to step, taken out of its graph."""

    nodes: list[ir.Node]
    x: ir.Value
    step: ir.Value
    x_next: ir.Value


class _RepeatDenoiseSteps(ir.passes.InPlacePass):
    """What both forms share: the input is a step, the output a decoder."""

    def __init__(self, num_steps: int) -> None:
        """Take the number of steps, at least 1."""
        super().__init__()
        self.num_steps = num_steps

    def requires(self, model: ir.Model) -> None:
        """The graph is a denoise step."""
        names = {value.name for value in model.graph.inputs}
        if not {"x", "step"} <= names or [value.name for value in model.graph.outputs] != ["x_next"]:
            raise ir.passes.PreconditionError(f"not a denoise step: inputs {sorted(names)}")
        if self.num_steps < 1:
            raise ir.passes.PreconditionError(f"{self.num_steps} denoise steps")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Take out what changes from step to step, and put it back `num_steps` times."""
        graph = model.graph
        x, step = (next(value for value in graph.inputs if value.name == name) for name in ("x", "step"))
        x_next = graph.outputs[0]
        inside = _dependents(graph, {x, step})
        graph.outputs.clear()
        # From the last to the first, so that a removed node has no user left in the graph.
        graph.remove(inside, safe=False)
        graph.inputs.remove(x)
        graph.inputs.remove(step)
        noise = ir.Value(name="noise", shape=x.shape, type=x.type)
        graph.inputs.insert(0, noise)
        actions = self._repeat(graph, _Step(inside, x, step, x_next), noise)
        actions.name, actions.shape, actions.type = "actions", x.shape, x.type
        graph.outputs.append(actions)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """The graph takes `noise` to `actions`."""
        names = [value.name for value in model.graph.inputs]
        if names[0] != "noise" or {"x", "step"} & set(names):
            raise ir.passes.PostconditionError(f"inputs {names}")
        if [value.name for value in model.graph.outputs] != ["actions"]:
            raise ir.passes.PostconditionError(f"outputs {[value.name for value in model.graph.outputs]}")

    @abstractmethod
    def _repeat(self, graph: ir.Graph, given: _Step, noise: ir.Value) -> ir.Value:
        """Append all steps to the graph; returns the value of the actions."""


class LoopDenoiseSteps(_RepeatDenoiseSteps):
    """Repeat the step in an ONNX `Loop`: ten steps have the nodes of one."""

    def _repeat(self, graph: ir.Graph, given: _Step, noise: ir.Value) -> ir.Value:
        number = ir.Value(name="step_number", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
        keep_on = ir.Value(name="keep_on", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
        given.step.replace_all_uses_with(number)
        goes_on = ir.node("Identity", [keep_on])
        goes_on.outputs[0].name = "goes_on"
        goes_on.outputs[0].shape, goes_on.outputs[0].type = ir.Shape([]), ir.TensorType(ir.DataType.BOOL)
        body = ir.Graph(
            [number, keep_on, given.x],
            [goes_on.outputs[0], given.x_next],
            nodes=[*given.nodes, goes_on],
            name="denoise_step",
        )
        count = _number(graph, "num_steps", self.num_steps)
        loop = ir.node("Loop", [count, None, noise], {"body": body}, name="denoise")
        graph.append(loop)
        return loop.outputs[0]

    def ensures(self, model: ir.Model) -> None:
        """One loop, fed by `noise`; nothing that depends on it is outside, and only that is inside."""
        super().ensures(model)
        outside = [
            node for node in _dependents(model.graph, {model.graph.inputs[0]}) if node.op_type != "Loop"
        ]
        loops = [node for node in model.graph if node.op_type == "Loop"]
        if outside or len(loops) != 1:
            raise ir.passes.PostconditionError(f"{len(loops)} loops, {len(outside)} nodes behind them")
        body = loops[0].attributes["body"].as_graph()
        idle = set(body) - set(_dependents(body, set(body.inputs)))
        if idle:
            raise ir.passes.PostconditionError(f"the same in every step: {sorted(str(n.name) for n in idle)}")


class UnrollDenoiseSteps(_RepeatDenoiseSteps):
    """Write the steps one after the other, for engines that plan a flat graph better than a loop.

    The step number becomes a constant of each step; `FoldWeightExpressions` afterwards turns the row of the
    schedule that a step reads into constants of its own.
    """

    def _repeat(self, graph: ir.Graph, given: _Step, noise: ir.Value) -> ir.Value:
        x = noise
        for number in range(self.num_steps):
            values = {given.x: x, given.step: _number(graph, f"step_{number}", number)}
            for node in given.nodes:
                graph.append(_copied(node, values, f"step_{number}"))
            x = values[given.x_next]
        # The nodes that were copied are in no graph, and must not count as users of the weights.
        for node in given.nodes:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)
        return x

    def ensures(self, model: ir.Model) -> None:
        """No loop is left."""
        super().ensures(model)
        if any(node.op_type == "Loop" for node in model.graph):
            raise ir.passes.PostconditionError("a loop is left")


def _copied(node: ir.Node, values: dict[ir.Value, ir.Value], prefix: str) -> ir.Node:
    """A node between other values; `values` maps old to new, and gets the outputs."""
    outputs = [
        ir.Value(name=f"{prefix}.{value.name}", shape=value.shape, type=value.type) for value in node.outputs
    ]
    values.update(zip(node.outputs, outputs, strict=True))
    return ir.Node(
        node.domain,
        node.op_type,
        [values.get(value, value) for value in node.inputs],
        node.attributes.values(),
        outputs=outputs,
        name=f"{prefix}.{node.name}",
    )


def _number(graph: ir.Graph, name: str, number: int) -> ir.Value:
    """An int64 scalar among the initializers."""
    name = fresh_name(graph, name)
    value = ir.Value(
        name=name,
        shape=ir.Shape([]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(number, dtype=ir.DataType.INT64, name=name),
    )
    graph.register_initializer(value)
    return value


def _dependents(graph: ir.Graph, sources: set[ir.Value]) -> list[ir.Node]:
    """The nodes that depend on any of `sources`, in the graph's order, which is topological."""
    reached = set(sources)
    nodes = []
    for node in graph:
        if any(value in reached for value in node.inputs if value is not None):
            reached.update(node.outputs)
            nodes.append(node)
    return nodes
