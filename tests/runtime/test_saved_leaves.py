"""Models with modules that cannot be traced, on disk: transformers' own are made again, others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import linearize
from linearize.errors import ArtifactError
from linearize.runtime.model import LinearizedModel
from tests import zoo

DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
JAMBA = {
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 4, "mamba_dt_rank": 4,
}  # fmt: skip
LEAF = "model.rotary_emb"


def scaled_llama(change: Callable[[nn.Module], Any] = lambda model: None) -> LinearizedModel:
    model = zoo.hf("llama", num_hidden_layers=1, rope_parameters=DYNAMIC_ROPE)()
    change(model)
    return linearize.compile(model, "window{window=5}", tokens=0, progress=False)


def test_dynamic_rotary_scaling_is_loaded_to_the_bit(tmp_path: Path) -> None:
    model = scaled_llama()
    assert model.program.leaves == (LEAF,)
    loaded, ids = linearize.load(model.save_pretrained(tmp_path / "saved")), zoo.tokens(2, 40)
    assert loaded.program.leaves == (LEAF,)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(loaded.generate(ids[:, :7], 12), model.generate(ids[:, :7], 12))
    again = linearize.load(loaded.save_pretrained(tmp_path / "again"))
    assert torch.equal(again.generate(ids[:, :7], 3), model.generate(ids[:, :7], 3))


def test_a_mamba_layer_is_loaded_with_its_weights_and_runs_step_by_step(tmp_path: Path) -> None:
    source = zoo.hf("jamba", **JAMBA)()
    model = linearize.compile(source, "none", progress=False)
    assert model.program.leaves == ("model.layers.0.mamba",)
    loaded, ids = linearize.load(model.save_pretrained(tmp_path / "saved")), zoo.tokens(3, 20)
    del source, model
    with torch.no_grad():
        expected = zoo.hf("jamba", **JAMBA)()(ids, use_cache=False).logits
        first, state = loaded.step(ids[:, :12])
        second, _ = loaded.step(ids[:, 12:], state)
    assert zoo.difference(torch.cat((first, second), 1), expected) <= 1e-4
    parameters = dict(loaded.source.module.named_parameters())
    assert "model.layers.0.mamba.in_proj.weight" in parameters


class Own(nn.Module):
    """Not of transformers, and cannot be traced."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * (2.0 if x.sum().item() > 1e9 else 1.0)


def put_own(model: nn.Module) -> None:
    model.model.layers[0].mlp = Own(model.model.layers[0].mlp)


def replace_forward(model: nn.Module) -> None:
    rotary = model.model.rotary_emb
    rotary.forward = lambda *args, **kwargs: type(rotary).forward(rotary, *args, **kwargs)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put_own, r"it is a tests\.runtime\..*\.Own, where transformers makes a .*LlamaMLP from the config"),
        (replace_forward, "the forward of its module was replaced"),
    ],
)
def test_a_leaf_that_transformers_would_not_make_is_refused(change: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=reason):
        scaled_llama(change).save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def edited(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    rows = json.loads((folder / "graph.json").read_text())
    for row in rows:
        if "linearize_leaf" in row:
            edit(row["linearize_leaf"])
    (folder / "graph.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda leaf: leaf.update({"class": "os.system"}), f"{LEAF} was saved as a os.system; transformers now"),
        (lambda leaf: leaf.pop("rules"), "the shapes of a module are malformed: KeyError"),
        (lambda leaf: leaf["rules"][0].update(dtype="load"), "the shapes of a module are malformed: TypeError"),
    ],
)
def test_a_damaged_leaf_is_an_error_that_names_it(edit: Any, reason: str, tmp_path: Path) -> None:
    folder = scaled_llama().save_pretrained(tmp_path / "saved")
    with pytest.raises(ArtifactError, match=reason):
        linearize.load(edited(folder, edit))
