"""States as onnxruntime-genai's own loop carries them, and the `genai_config.json` that tells it so.

That loop knows, per layer, `past_key_values.{i}.conv_state` (rank 3) and `past_key_values.{i}.recurrent_state` (rank 4)
together: of one shape for all layers, every dim but the batch fixed, starting at zero. Mixers have several states of
several shapes, so all float32 numbers of a layer's states lie one after another in `recurrent_state` [B, 1, 1, N], N
being the widest layer's; the model's own counters lie with its first layer's. `conv_state` [B, 1, 1] is passed through.
Counters become float32, exact to 16 million tokens. The mask is the whole one, of all tokens so far; its last T
entries are read, so that the last T alone serve as well. Positions are counted in the graph.

Not possible: a state that grows (softmax that is kept), as its mask and layout are not genai's. There is no beam
search: genai does not reorder recurrent states.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.errors import ExportError
from linearize.export.interface import Part, Port
from linearize.export.names import GRAPH_FILE
from linearize.export.ways import GENAI
from linearize.program import MASK, POSITIONS, TOKENS, StateTensor

if TYPE_CHECKING:
    from linearize.runtime.model import LinearizedModel

CONFIG_FILE = "genai_config.json"
PAST, PRESENT = "past_key_values.%d.", "present.%d."
CONV, RECURRENT = "conv_state", "recurrent_state"
LONGEST = 1 << 20  # genai wants a bound on the context and allocates nothing by it here


class Packed:
    """The graph between genai's states; see the module's text.

    Raises:
        ExportError: a state grows with the context, or there is none.
    """

    def __init__(self, compiled: LinearizedModel) -> None:
        specs = compiled.state_specs
        check_fixed(specs)
        self.rows = layers_of(specs)
        width = max(sum(_numbers(spec) for spec in row) for row in self.rows.values())
        self.ports = tuple(port for layer, row in self.rows.items() for port in _ports(layer, row, width))
        self._order = [spec.name for spec in specs]
        self.module: nn.Module = _Module(compiled, self)

    def token_inputs(self) -> dict[str, tuple[str, str]]:
        return {TOKENS: ("batch", "length"), MASK: ("batch", "total")}

    def pack(self, states: Mapping[str, Tensor]) -> list[Tensor]:
        """[conv_state, recurrent_state] of every layer."""
        batch = next(states[spec.name] for row in self.rows.values() for spec in row if spec.batched).shape[0]
        packed = []
        for row, port in zip(self.rows.values(), self.ports[1::2], strict=True):
            flat = [_flat(states[spec.name], spec, batch) for spec in row]
            missing = port.state.shape[-1] - sum(_numbers(spec) for spec in row)
            flat += [flat[0].new_zeros(batch, missing)] if missing else []
            whole = torch.cat(flat, dim=1)
            packed += [whole.new_zeros(batch, 1, 1), whole.unsqueeze(1).unsqueeze(1)]
        return packed

    def unpack(self, packed: Sequence[Tensor]) -> list[Tensor]:
        """The states in the model's order."""
        found: dict[str, Tensor] = {}
        for row, port, tensor in zip(self.rows.values(), self.ports[1::2], packed[1::2], strict=True):
            sizes = [_numbers(spec) for spec in row]
            sizes.append(port.state.shape[-1] - sum(sizes))
            pieces = torch.split(tensor[:, 0, 0], sizes, dim=1)
            for spec, piece in zip(row, pieces, strict=False):
                found[spec.name] = _unflat(piece, spec)
        return [found[name] for name in self._order]


class _Module(nn.Module):
    """(input_ids, whole mask, packed states) -> (logits, packed states)."""

    def __init__(self, compiled: LinearizedModel, packed: Packed) -> None:
        super().__init__()
        self.graph_module = compiled.graph_module
        self.packed = packed
        self.takes_positions = POSITIONS in compiled.program.input_names()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        length, total = input_ids.shape[1], attention_mask.shape[1]
        last = torch.arange(length, device=input_ids.device) + (total - length)
        mask = torch.index_select(attention_mask, 1, last)
        own = self.packed.unpack(states)
        inputs = [input_ids, mask]
        if self.takes_positions:
            seen = own[self.packed._order.index("seen")]
            inputs.append((seen.unsqueeze(1) + mask.cumsum(1) - 1).clamp_min(0))
        logits, *new = self.graph_module(*inputs, *own)
        result = self.packed.pack(dict(zip(self.packed._order, new, strict=True)))
        result[::2] = [conv.clone() for conv in states[::2]]
        return (logits, *result)


def check_fixed(specs: Sequence[StateTensor]) -> None:
    """Raise `ExportError` unless every state has a fixed shape and there is one."""
    growing = GENAI.growing(specs)
    if growing is not None:
        raise ExportError(f"{growing}; compile with a recipe that keeps no softmax, or export without --genai")
    if not any(_layer(spec.name) is not None for spec in specs):
        raise ExportError("onnxruntime-genai carries states by layer, and this model's layers have none")


def layers_of(specs: Sequence[StateTensor]) -> dict[int, list[StateTensor]]:
    """The states of each layer that has any; those of no layer are its first one's."""
    rows: dict[int, list[StateTensor]] = {}
    for spec in specs:
        layer = _layer(spec.name)
        if layer is not None:
            rows.setdefault(layer, []).append(spec)
    first = next(iter(rows))
    rows[first] = [spec for spec in specs if _layer(spec.name) is None] + rows[first]
    return rows


def _layer(name: str) -> int | None:
    found = re.match(r"layers_(\d+)_", name)
    return int(found.group(1)) if found else None


def _ports(layer: int, row: Sequence[StateTensor], width: int) -> tuple[Port, Port]:
    parts, start = [], 0
    for spec in row:
        parts.append(Part(spec.name, start, spec.shape, str(spec.dtype).removeprefix("torch.")))
        start += _numbers(spec)
    past, present = PAST % layer, PRESENT % layer
    return (
        Port(past + CONV, present + CONV, StateTensor(CONV, (1, 1))),
        Port(past + RECURRENT, present + RECURRENT, StateTensor(RECURRENT, (1, 1, width)), tuple(parts)),
    )


def _numbers(spec: StateTensor) -> int:
    return torch.Size(spec.shape).numel()


def _flat(tensor: Tensor, spec: StateTensor, batch: int) -> Tensor:
    tensor = tensor if spec.batched else tensor.unsqueeze(0).expand(batch, *spec.shape)
    return tensor.to(torch.float32).reshape(batch, _numbers(spec))


def _unflat(piece: Tensor, spec: StateTensor) -> Tensor:
    """[B, numbers] -> the state; what has no batch is every row's alike."""
    own = piece.reshape(piece.shape[0], *spec.shape) if spec.batched else piece[0].reshape(spec.shape)
    return own != 0 if spec.dtype == torch.bool else own.to(spec.dtype)


def write_config(compiled: LinearizedModel, packed: Packed, folder: Path) -> None:
    """`genai_config.json`: greedy and sampling, no beam search."""
    (folder / CONFIG_FILE).write_text(json.dumps(config_of(compiled, packed), indent=1))


def config_of(compiled: LinearizedModel, packed: Packed) -> dict[str, Any]:
    config = compiled.config or {}
    spec = next(site.attention for site in compiled.program.matched)
    end = config.get("eos_token_id")
    vocabulary = compiled.program.vocab_size or 1
    end = vocabulary - 1 if end is None else end  # genai stops at one; it must be some id
    pad = config.get("pad_token_id")
    longest = compiled.program.max_positions or LONGEST
    layers = 1 + max(packed.rows)
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": config.get("bos_token_id") or 0,
            "eos_token_id": end,
            "pad_token_id": pad if pad is not None else (end[0] if isinstance(end, list) else end),
            "vocab_size": vocabulary,
            "context_length": longest,
            "decoder": {
                "filename": GRAPH_FILE,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "num_hidden_layers": layers,
                "num_attention_heads": spec.heads,
                "num_key_value_heads": spec.kv_heads,
                "head_size": spec.head_dim,
                "hidden_size": spec.hidden_dim,
                "inputs": {
                    "input_ids": TOKENS,
                    "attention_mask": MASK,
                    "past_conv_names": PAST + CONV,
                    "past_recurrent_names": PAST + RECURRENT,
                },
                "outputs": {
                    "logits": "logits",
                    "present_conv_names": PRESENT + CONV,
                    "present_recurrent_names": PRESENT + RECURRENT,
                },
            },
        },
        "search": {"do_sample": False, "num_beams": 1, "max_length": longest, "past_present_share_buffer": True},
    }
