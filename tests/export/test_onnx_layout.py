"""Fewer nodes, the same numbers: rotations, products of one input, sums before norms, what only moves numbers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx_ir.passes import common

from linearize.export.names import CONTRIB
from linearize.export.onnx_layout import canonical, tidy_layout
from linearize.export.onnx_norms import fuse_skips
from linearize.export.onnx_products import merge_products
from linearize.export.onnx_rotary import fuse_rotations


def model(text):
    """The body of a graph in ONNX's text form; shapes are inferred, as the exporter gives them."""
    text = f'<ir_version: 10, opset_import: ["" : 23, "{CONTRIB}" : 1]> g {text}'
    return common.ShapeInferencePass()(ir.from_onnx_text(text)).model


def run(built, **feeds):
    session = onnxruntime.InferenceSession(ir.to_proto(built).SerializeToString())
    return session.run(None, feeds)


def kinds(built):
    return [node.op_type for node in built.graph]


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


MOVES = """(float[b, t, 6] x, bool[b, t, 1, 1] c) => (float[b, t, 6] y)
<int64[4] four = {0, 0, 2, 3}, int64[3] three = {0, 0, 6}, float zero = {0.0}, float one = {1.0}> {
  heads = Reshape(x, four)
  first = Transpose<perm = [0, 2, 1, 3]>(heads)
  back = Transpose<perm = [0, 2, 1, 3]>(first)
  size = Shape(back)
  zeros = Expand(zero, size)
  kept = Where(c, back, zeros)
  same = Mul(kept, one)
  y = Reshape(same, three)
}"""


def test_what_only_moves_numbers_goes_and_zeros_stay_one_number():
    built, x = model(MOVES), numbers(2, 5, 6)
    c = numbers(2, 5, 1, 1, seed=1) > 0
    expected = run(built, x=x, c=c)[0]
    tidy_layout(built.graph)
    common.RemoveUnusedNodesPass()(built)
    assert kinds(built) == ["Reshape", "Where", "Reshape"]
    np.testing.assert_array_equal(run(built, x=x, c=c)[0], expected)


SOFTPLUS = """(float[n, 4] x) => (float[n, 4] y)
<float limit = {LIMIT}, float one = {1.0}, float sixteen = {16.0}> {
  soft = Softplus(x)
  scaled = Div(soft, one)
  large = Greater(x, limit)
  both = Where(large, x, scaled)
  minus = Neg(both)
  y = Div(minus, sixteen)
}"""


@pytest.mark.parametrize(("limit", "nodes"), [("20.0", ["Softplus", "Div"]), ("2.0", None)])
def test_a_softplus_is_one_node_only_where_the_branches_are_equal(limit, nodes):
    built, x = model(SOFTPLUS.replace("LIMIT", limit)), np.array([[-90.0, 0.5, 3.0, 90.0]], np.float32)
    expected = run(built, x=x)[0]
    tidy_layout(built.graph)
    common.RemoveUnusedNodesPass()(built)
    assert nodes is None or kinds(built) == nodes
    assert ("Where" in kinds(built)) == (nodes is None)
    np.testing.assert_allclose(run(built, x=x)[0], expected, atol=1e-6)


@pytest.mark.parametrize(("stop", "nodes"), [("-1", ["Identity"]), ("-2", None)])
def test_the_parts_of_a_tensor_joined_are_the_tensor(stop, nodes):
    built = model(f"""(float[b, 5] x) => (float[b, n] y)
    <int64[1] zero = {{0}}, int64[1] stop = {{{stop}}}, int64[1] start = {{-1}}, int64[1] end = {{99}},
     int64[1] axis = {{-1}}> {{
      low = Slice(x, zero, stop, axis)
      high = Slice(x, start, end, axis)
      joined = Concat<axis = -1>(low, high)
      y = Identity(joined)
    }}""")
    expected = run(built, x=numbers(2, 5))[0]
    tidy_layout(built.graph)
    common.RemoveUnusedNodesPass()(built)
    assert (kinds(built) == ["Identity"]) == (nodes is not None)
    np.testing.assert_array_equal(run(built, x=numbers(2, 5))[0], expected)


@pytest.mark.parametrize(("axis", "second", "nodes"), [(1, 2, ["Identity"]), (1, 3, None), (2, 2, None)])
def test_parts_are_joined_along_their_own_dim_and_a_slice_of_everything_is_its_tensor(axis, second, nodes):
    built = model(f"""(float[b, 5, 5] x) => (float[b, n, m] y)
    <int64[1] zero = {{0}}, int64[1] stop = {{2}}, int64[1] start = {{{second}}}, int64[1] end = {{{2**63 - 1}}},
     int64[1] axis = {{1}}, int64[1] one = {{1}}, int64[1] two = {{2}}> {{
      all = Slice(x, zero, end, zero, one)
      low = Slice(all, zero, stop, axis, one)
      high = Slice(x, start, end, axis, one)
      same = Slice(high, zero, two, axis)
      joined = Concat<axis = {axis}>(low, {"high" if axis == 1 else "same"})
      y = Identity(joined)
    }}""")
    expected = run(built, x=numbers(2, 5, 5))[0]
    tidy_layout(built.graph)
    common.RemoveUnusedNodesPass()(built)
    assert (kinds(built) == ["Identity"]) == (nodes is not None)
    assert kinds(built).count("Slice") <= 3
    np.testing.assert_array_equal(run(built, x=numbers(2, 5, 5))[0], expected)


def test_an_einsum_by_head_is_a_product():
    built = model("""(float[b, t, 2, 3] x, float[2, 3, 4] w) => (float[b, t, 2, 4] y) {
      y = Einsum<equation = "bthd,hdf->bthf">(x, w)
    }""")
    feeds = {"x": numbers(2, 5, 2, 3), "w": numbers(2, 3, 4)}
    expected = run(built, **feeds)[0]
    tidy_layout(built.graph)
    assert kinds(built) == ["Transpose", "MatMul", "Transpose"]
    np.testing.assert_allclose(run(built, **feeds)[0], expected, atol=1e-6)
    assert canonical("bthd,hdf->bthf") == "abcd,cde->abce"


ROTATION = """(float[b, t, 8] x, float[b, t, 2] f) => (float[b, 2, t, 4] y)
<int64[4] four = {0, 0, 2, 4}, int64[1] zero = {0}, int64[1] half = {2}, int64[1] end = {9}, int64[1] axis = {3},
 int64[1] one = {1}> {
  heads = Reshape(x, four)
  first = Transpose<perm = [0, 2, 1, 3]>(heads)
  angles = Concat<axis = -1>(f, SECOND)
  cos = Cos(angles)
  sin = Sin(angles)
  c = Unsqueeze(cos, one)
  s = Unsqueeze(sin, one)
  low = Slice(first, zero, half, axis)
  high = Slice(first, half, end, axis)
  minus = Neg(high)
  swapped = Concat<axis = -1>(minus, low)
  straight = Mul(first, c)
  turned = Mul(swapped, s)
  sum = Add(straight, turned)
  y = Identity(sum)
}"""


def test_a_rotation_becomes_one_node_over_packed_heads():
    built, feeds = model(ROTATION.replace("SECOND", "f")), {"x": numbers(2, 5, 8), "f": numbers(2, 5, 2)}
    expected = run(built, **feeds)[0]
    assert fuse_rotations(built.graph) == 1
    tidy_layout(built.graph)
    common.RemoveUnusedNodesPass()(built)
    rotation = next(node for node in built.graph if node.op_type == "RotaryEmbedding")
    assert rotation.inputs[0] is built.graph.inputs[0]
    assert {"Neg", "Mul"}.isdisjoint(kinds(built))
    np.testing.assert_allclose(run(built, **feeds)[0], expected, atol=1e-6)


def test_other_angles_in_the_second_half_are_no_such_rotation():
    built = model(ROTATION.replace("angles =", "twice = Add(f, f)\n  angles =").replace("SECOND", "twice"))
    assert fuse_rotations(built.graph) == 0


def merged(width, is_own=lambda value: False):
    """x [b,t,40] times weights of 64 and `width` columns; how many groups were merged, and the graph."""
    float_type = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(["b", "t", 40]), type=float_type)
    weights = []
    for name, columns in (("first", 64), ("second", width)):
        tensor = ir.tensor(numbers(40, columns), name=name)
        weights.append(ir.Value(name=name, shape=tensor.shape, type=float_type, const_value=tensor))
    nodes = [ir.node("MatMul", [x, weight]) for weight in weights]
    outputs = [node.outputs[0] for node in nodes]
    for output, name, columns in zip(outputs, "yz", (64, width), strict=True):
        output.name, output.type, output.shape = name, float_type, ir.Shape(["b", "t", columns])
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=weights, opset_imports={"": 23})
    built = ir.Model(graph, ir_version=10)
    expected = run(built, x=numbers(2, 3, 40))
    count = merge_products(graph, is_own)
    common.RemoveUnusedNodesPass()(built)
    for mine, theirs in zip(run(built, x=numbers(2, 3, 40)), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    return count, kinds(built)


def test_products_of_one_input_are_one_product():
    assert merged(96) == (1, ["MatMul", "Split"])


def test_narrow_weights_and_the_mixers_own_stay_by_themselves():
    assert merged(16) == (0, ["MatMul", "MatMul"])
    assert merged(96, is_own=lambda value: value.name == "second") == (0, ["MatMul", "MatMul"])


def test_the_sum_before_a_norm_joins_it_and_is_still_there():
    built = model("""(float[b, t, 8] x, float[b, t, 8] z, float[8] w) => (float[b, t, 8] y, float[b, t, 8] twice) {
      sum = Add(x, z)
      y = RMSNormalization<axis = -1, epsilon = 0.01>(sum, w)
      twice = Add(sum, sum)
    }""")
    feeds = {"x": numbers(2, 3, 8), "z": numbers(2, 3, 8, seed=1), "w": numbers(8)}
    expected = run(built, **feeds)
    assert fuse_skips(built.graph) == 1
    assert kinds(built) == ["SkipSimplifiedLayerNormalization", "Add"]
    for mine, theirs in zip(run(built, **feeds), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
