"""OpenVINO graphs, changed before they are compiled: shapes that are known, and what a loop need not do in every turn.

What flow steps read without changing it, keys and values of the prefix above all, arrives row by row in float32; a
product over heads wants it head by head, and in bfloat16 where the stage computes in that. `split` moves this into a
graph of its own, to be run when the arrays change. It only moves and rounds values, as the stage did: same bits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from vlac.graph import Program, Repeat

MOVES = ("Reshape", "Transpose")
"""Ops that only move values; their second input says how."""


@dataclass(frozen=True)
class Split:
    """`stage` reads what `before` computes, output by output, in its last inputs."""

    before: Any
    stage: Any


def changing_inputs(program: Program, stage: str) -> set[str] | None:
    """The inputs of a stage that differ between turns of its loop; None: no loop runs it."""
    for step in program.schedule.steps:
        if isinstance(step, Repeat) and step.stage == stage:
            return step.own_inputs
    return None


def set_shapes(model: Any, shapes: Mapping[str, Sequence[int | None]]) -> None:
    """Gives the model's inputs their shapes, by name; None: open.

    Not by Model.reshape (OpenVINO 2026.4): its rewrites read the shape of the weights of a product behind a Reshape,
    and int8 weights that have a second reader become float.
    """
    from openvino import PartialShape

    for parameter in model.get_parameters():
        known = next(shapes[name] for name in parameter.output(0).get_names() if name in shapes)
        parameter.set_partial_shape(PartialShape([-1 if d is None else d for d in known]))
    model.validate_nodes_and_infer_types()


def keep_bf16(model: Any) -> int:
    """Lets products read bfloat16 weights as they are; how many do. For models computed in bf16 on CPUs that have it.

    OpenVINO 2026.4 otherwise makes float32 of them, and keeps that beside the bfloat16 that it packs: three times the
    memory. Products that a bias or GELU follows stay: these are one kernel with it only while all of it is float32.
    """
    from openvino import Type, opset13

    kept = 0
    for product in [n for n in model.get_ordered_ops() if n.get_type_name() == "MatMul"]:
        wide = product.input_value(1).get_node()
        if wide.get_type_name() != "Convert" or wide.input_value(0).get_element_type() != Type.bf16:
            continue
        if wide.input_value(0).get_node().get_type_name() != "Constant" or _ends_in_kernel(product):
            continue
        how = product.get_attributes()
        narrow = opset13.convert(product.input_value(0), "bf16")
        made = opset13.matmul(narrow, wide.input_value(0), how["transpose_a"], how["transpose_b"])
        result = opset13.convert(made, "f32", name=product.get_friendly_name())
        for reader in list(product.output(0).get_target_inputs()):
            reader.replace_source_output(result.output(0))
        kept += 1
    return kept


def _ends_in_kernel(product: Any) -> bool:
    """Whether OpenVINO computes what follows a product in the product's kernel: a bias, or GELU."""
    for reader in product.output(0).get_target_inputs():
        node = reader.get_node()
        constants = [i for i in node.input_values() if i.get_node().get_type_name() == "Constant"]
        if node.get_type_name() == "Gelu" or (node.get_type_name() == "Add" and constants):
            return True
    return False


def split(model: Any, changing: Collection[str], precision: str) -> Split | None:
    """Takes the moves between unchanging float32 inputs and products out of a loop's model; None: there are none.

    precision: "bf16" or "f32", in which the model will be compiled. The model given is used up.
    """
    from openvino import Model, Type, opset13

    rounded = precision == "bf16"
    parameters = list(model.get_parameters())
    fixed = {p.get_name() for p in parameters if not set(changing) & p.output(0).get_names()}
    taken: dict[tuple[str, int], tuple[Any, Any]] = {}  # an output of the given model, and the input that it becomes

    def unchanging(output: Any) -> bool:
        node = output.get_node()
        if node.get_name() in fixed:
            return bool(output.get_element_type() == Type.f32)
        return _constant(node) is not None and unchanging(node.input_value(0))

    def take(into: Any) -> None:
        output = into.get_source_output()
        key = (output.get_node().get_name(), output.get_index())
        if key not in taken:
            if key[0] in fixed and not rounded:
                return  # nothing to do in between
            name = f"{output.get_node().get_friendly_name()}/moved"
            given = opset13.parameter(output.get_partial_shape(), Type.bf16 if rounded else Type.f32, name=name)
            given.output(0).set_names({name})
            taken[key] = (output, given)
        given = taken[key][1]
        into.replace_source_output((opset13.convert(given, "f32") if rounded else given).output(0))

    for product in [n for n in model.get_ordered_ops() if n.get_type_name() == "MatMul"]:
        for into in product.inputs():
            if unchanging(into.get_source_output()):
                take(into)
            elif joined := _moved_parts(into.get_source_output(), unchanging):
                into.replace_source_output(joined.output(0))
                for part in [p for p in joined.inputs() if unchanging(p.get_source_output())]:
                    take(part)
    if not taken:
        return None
    results = [opset13.convert(output, "bf16") if rounded else output for output, _ in taken.values()]
    before = _without_unread(Model([opset13.result(r) for r in results], parameters, "before"))
    stage = _without_unread(Model(model.get_results(), [*parameters, *(p for _, p in taken.values())], "stage"))
    return Split(before, stage)


def _constant(node: Any) -> list[int] | None:
    """By what a node that only moves values does so; None: it is another node, or that is computed."""
    if node.get_type_name() not in MOVES:
        return None
    how = node.input_value(1).get_node()
    return [int(v) for v in how.get_vector()] if how.get_type_name() == "Constant" else None


def _moved_parts(output: Any, unchanging: Any) -> Any:
    """transpose(reshape(concat(rows))) as the concat of transposed parts, if some of them are unchanging; or None."""
    from openvino import opset13

    turned = output.get_node()
    order = _constant(turned)
    if order is None or turned.get_type_name() != "Transpose":
        return None
    cut = turned.input_value(0).get_node()
    shape = _constant(cut)
    if shape is None or cut.get_type_name() != "Reshape" or shape.count(-1) != 1:
        return None
    rows = cut.input_value(0).get_node()
    if rows.get_type_name() != "Concat" or rows.get_attributes()["axis"] != 0:
        return None
    parts, at = rows.input_values(), shape.index(-1)
    width = parts[0].get_partial_shape()
    sizes = [*shape[:at], *shape[at + 1 :]]
    if len(width) != 2 or not width[1].is_static or prod(sizes) != width[1].get_length() or set(shape[:at]) - {1}:
        return None
    if not any(unchanging(p) for p in parts):
        return None
    pieces = [opset13.transpose(opset13.reshape(p, cut.input_value(1), True), turned.input_value(1)) for p in parts]
    return opset13.concat(pieces, order.index(at))


def _without_unread(model: Any) -> Any:
    """The model, without the inputs that nothing in it reads."""
    read = {i.get_source_output().get_node().get_name() for op in model.get_ordered_ops() for i in op.inputs()}
    for parameter in model.get_parameters():
        if parameter.get_name() not in read:
            model.remove_parameter(parameter)
    return model
