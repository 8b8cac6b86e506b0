"""An RMS norm becomes one node only when it is one: same input, last axis, a weight of one dim."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from linearize.export.onnx_norms import fuse_norms


def norm(axis=-1, other_input=False, weight_shape=(4,), power=2.0):
    """y = w x / sqrt(mean x^2 + 0.01), or something like it."""
    weights = {
        "power": np.float32(power), "axes": np.array([axis]), "epsilon": np.float32(0.01),
        "w": np.linspace(0.5, 2, int(np.prod(weight_shape)), dtype=np.float32).reshape(weight_shape),
    }  # fmt: skip
    made = {}
    for name, array in weights.items():
        tensor = ir.tensor(np.asarray(array), name=name)
        made[name] = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    float_type = ir.TensorType(ir.DataType.FLOAT)
    x, z = (ir.Value(name=name, shape=ir.Shape(["n", 3, 4]), type=float_type) for name in "xz")
    nodes = [ir.node("Pow", [x, made["power"]])]
    nodes.append(ir.node("ReduceMean", [nodes[-1].outputs[0], made["axes"]], attributes={"keepdims": 1}))
    nodes.append(ir.node("Add", [nodes[-1].outputs[0], made["epsilon"]]))
    for kind in ("Sqrt", "Reciprocal"):
        nodes.append(ir.node(kind, [nodes[-1].outputs[0]]))
    nodes.append(ir.node("Mul", [z if other_input else x, nodes[-1].outputs[0]]))
    nodes.append(ir.node("Mul", [made["w"], nodes[-1].outputs[0]]))
    y = nodes[-1].outputs[0]
    y.name, y.type = "y", float_type
    graph = ir.Graph([x, z], [y], nodes=nodes, initializers=list(made.values()), opset_imports={"": 23})
    return ir.Model(graph, ir_version=10)


def run(model):
    x, z = np.random.default_rng(0).normal(size=(2, 2, 3, 4)).astype(np.float32)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(["y"], {"x": x, "z": z})[0]


def test_a_norm_becomes_one_node_with_the_same_values():
    fused = norm()
    assert fuse_norms(fused.graph) == 1
    assert "RMSNormalization" in {node.op_type for node in fused.graph}
    np.testing.assert_allclose(run(fused), run(norm()), atol=1e-6)


@pytest.mark.parametrize(
    "unlike", [{"axis": 1}, {"other_input": True}, {"weight_shape": (3, 4)}, {"power": 3.0}], ids=str
)
def test_what_only_looks_like_a_norm_stays(unlike):
    assert fuse_norms(norm(**unlike).graph) == 0
