"""A Llama in onnxruntime with its best cache operator: GroupQueryAttention, rotation inside, one buffer a layer that is
read and written in place. Built by hand, node by node, so that nothing stands in its way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper


def write_gqa_model(model: Any, path: Path, longest: int) -> None:
    """`model` a transformers LlamaForCausalLM; `longest` the tokens that the rotation's table covers."""
    config = model.config
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    weights: dict[str, np.ndarray] = {name: p.detach().numpy() for name, p in model.state_dict().items()}
    angles = np.arange(longest)[:, None] * (10000.0 ** (-np.arange(0, dim, 2) / dim))[None]
    constants = {"cos": np.cos(angles), "sin": np.sin(angles)}
    constants |= {
        name: array.T if array.ndim == 2 and "embed" not in name else array for name, array in weights.items()
    }
    nodes: list[onnx.NodeProto] = []
    own = {"domain": "com.microsoft"}
    epsilon = config.rms_norm_eps

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def norm(x: str, name: str, output: str) -> str:
        return add("SimplifiedLayerNormalization", [x, name], output, epsilon=epsilon, axis=-1)

    states = []
    x = add("Gather", ["model.embed_tokens.weight", "input_ids"], "x")
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm.weight", f"n{i}")
        q, k, v = (add("MatMul", [h, f"{at}self_attn.{n}_proj.weight"], f"{n}{i}") for n in "qkv")
        states += [(f"past.{i}.{n}", f"present.{i}.{n}", [1, kv_heads, "room", dim]) for n in ("key", "value")]
        nodes.append(helper.make_node(
            "GroupQueryAttention",
            [q, k, v, f"past.{i}.key", f"past.{i}.value", "seqlens_k", "total", "cos", "sin"],
            [f"a{i}", f"present.{i}.key", f"present.{i}.value"],
            num_heads=heads, kv_num_heads=kv_heads, do_rotary=1, scale=dim**-0.5, **own,
        ))  # fmt: skip
        o = add("MatMul", [f"a{i}", at + "self_attn.o_proj.weight"], f"o{i}")
        x = add("Add", [x, o], f"r{i}")
        h = norm(x, at + "post_attention_layernorm.weight", f"m{i}")
        gate, up = (add("MatMul", [h, f"{at}mlp.{n}_proj.weight"], f"{n}{i}") for n in ("gate", "up"))
        silu = add("Mul", [gate, add("Sigmoid", [gate], f"s{i}")], f"g{i}")
        down = add("MatMul", [add("Mul", [silu, up], f"u{i}"), at + "mlp.down_proj.weight"], f"d{i}")
        x = add("Add", [x, down], f"y{i}")
    add("MatMul", [norm(x, "model.norm.weight", "final"), "lm_head.weight"], "logits")
    used = {name for node in nodes for name in node.input}
    integer, real = TensorProto.INT64, TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("input_ids", integer, [1, "T"])]
    inputs += [helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [1])]
    inputs += [helper.make_tensor_value_info("total", TensorProto.INT32, [1])]
    inputs += [helper.make_tensor_value_info(past, real, shape) for past, _, shape in states]
    outputs = [helper.make_tensor_value_info("logits", real, [1, "T", config.vocab_size])]
    outputs += [helper.make_tensor_value_info(present, real, shape) for _, present, shape in states]
    kept = [numpy_helper.from_array(np.ascontiguousarray(a, np.float32), n) for n, a in constants.items() if n in used]
    graph = helper.make_graph(nodes, "gqa", inputs, outputs, kept)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


class GqaModel:
    """One sequence over buffers with room for `room` tokens."""

    def __init__(self, path: Path, room: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_inputs() if value.name.startswith("past.")]
        shapes = {value.name: value.shape for value in self.session.get_inputs()}
        self.cache = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros([room if dim == "room" else dim for dim in shapes[name]], np.float32)
            )
            for name in self.names
        }
        self.tokens = 0

    def fill(self, tokens: int) -> None:
        """As if `tokens` had been read: random keys and values."""
        generator = np.random.default_rng(0)
        for name, value in self.cache.items():
            value.update_inplace(generator.normal(size=value.shape()).astype(np.float32))
            assert name in self.names
        self.tokens = tokens

    def step(self, ids: np.ndarray) -> np.ndarray:
        """int64 [1, T] -> logits [1, T, V]; keys and values are written in place."""
        self.tokens += ids.shape[1]
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("seqlens_k", np.array([self.tokens - 1], np.int32))
        binding.bind_cpu_input("total", np.array([self.tokens], np.int32))
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past.", "present."), value)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        return np.asarray(binding.get_outputs()[-1].numpy())
