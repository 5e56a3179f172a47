"""One denoise step -> the decoder: all steps in one graph.

The steps become an ONNX `Loop` around the step's own nodes; unrolled, ten steps are ten times the nodes to
export, simplify and load.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["LoopDenoiseSteps"]


class LoopDenoiseSteps(ir.passes.InPlacePass):
    """Repeat the graph `x, step -> x_next` for a number of steps, from input `noise` to output `actions`.

    Nodes that depend on neither `x` nor `step` (the masks, the rotary angles, pi0's state token) stay outside
    of the loop and run once.
    """

    def __init__(self, num_steps: int) -> None:
        """Take the number of steps, at least 1."""
        super().__init__()
        self.num_steps = num_steps

    def requires(self, model: ir.Model) -> None:
        """The graph is a denoise step."""
        names = {value.name for value in model.graph.inputs}
        if not {"x", "step"} <= names or [value.name for value in model.graph.outputs] != ["x_next"]:
            raise ir.passes.PreconditionError(f"not a denoise step: inputs {sorted(names)}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Move what changes from step to step into the body of a loop."""
        graph = model.graph
        x, step = (next(value for value in graph.inputs if value.name == name) for name in ("x", "step"))
        x_next = graph.outputs[0]
        inside = _dependents(graph, {x, step})
        graph.outputs.clear()
        # From the last to the first, so that a removed node has no user left in the graph.
        graph.remove(inside, safe=False)
        graph.inputs.remove(x)
        graph.inputs.remove(step)

        number = ir.Value(name="step_number", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
        keep_on = ir.Value(name="keep_on", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
        step.replace_all_uses_with(number)
        goes_on = ir.node("Identity", [keep_on])
        goes_on.outputs[0].name = "goes_on"
        goes_on.outputs[0].shape, goes_on.outputs[0].type = ir.Shape([]), ir.TensorType(ir.DataType.BOOL)
        body = ir.Graph(
            [number, keep_on, x], [goes_on.outputs[0], x_next], nodes=[*inside, goes_on], name="denoise_step"
        )

        count = ir.Value(
            name="num_steps",
            shape=ir.Shape([]),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=ir.tensor(self.num_steps, dtype=ir.DataType.INT64, name="num_steps"),
        )
        graph.register_initializer(count)
        noise = ir.Value(name="noise", shape=x.shape, type=x.type)
        actions = ir.Value(name="actions", shape=x.shape, type=x.type)
        graph.inputs.insert(0, noise)
        graph.append(ir.node("Loop", [count, None, noise], {"body": body}, outputs=[actions], name="denoise"))
        graph.outputs.append(actions)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """One loop, fed by `noise`, and nothing that depends on it is outside."""
        outside = [
            node for node in _dependents(model.graph, {model.graph.inputs[0]}) if node.op_type != "Loop"
        ]
        loops = [node for node in model.graph if node.op_type == "Loop"]
        if outside or len(loops) != 1:
            raise ir.passes.PostconditionError(f"{len(loops)} loops, {len(outside)} nodes behind them")


def _dependents(graph: ir.Graph, sources: set[ir.Value]) -> list[ir.Node]:
    """The nodes that depend on any of `sources`, in the graph's order, which is topological."""
    reached = set(sources)
    nodes = []
    for node in graph:
        if any(value in reached for value in node.inputs if value is not None):
            reached.update(node.outputs)
            nodes.append(node)
    return nodes
