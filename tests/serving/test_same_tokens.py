"""Greedy tokens are the same through generate, step, transformers' generate, the ONNX file and the HTTP endpoint."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import linearize
from linearize.export.runner import OnnxModel
from tests import zoo
from tests.serving.conftest import RECIPE, Characters

NEW = 14
PADDING = {1: (0,), 4: (0, 3, 7, 12)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    path = tmp_path_factory.mktemp("onnx") / "model"
    return OnnxModel(Path(linearize.export(zoo.compiled("llama", RECIPE), path, format="onnx")))


def stepped(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    model, found = zoo.compiled("llama", RECIPE), []
    with torch.no_grad():
        logits, state = model.step(ids, None, mask)
        for _ in range(NEW):
            found.append(logits[:, -1].argmax(-1))
            logits, state = model.step(found[-1][:, None], state)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("batch", [1, 4])
def test_every_way_of_generating_gives_the_same_tokens(
    batch: int, exported: OnnxModel, serve: Callable[..., Any]
) -> None:
    ids = zoo.tokens(batch, 15, seed=batch)
    mask = torch.ones_like(ids)
    for row, count in enumerate(PADDING[batch]):
        ids[row, :count], mask[row, :count] = 0, 0
    model = zoo.compiled("llama", RECIPE)
    expected = model.generate(ids, NEW, attention_mask=mask)[:, 15:]

    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = model.to_transformers().generate(ids, attention_mask=mask, max_new_tokens=NEW, **options)[:, 15:]
    written = torch.from_numpy(exported.generate(ids.numpy(), NEW, attention_mask=mask.numpy()))[:, 15:]
    url = f"{serve().url}/v1/completions"

    def served(row: int) -> list[int]:
        prompt = ids[row, PADDING[batch][row] :].tolist()
        body = {"prompt": prompt, "max_tokens": NEW, "temperature": 0}
        text = httpx.post(url, json=body, timeout=60).json()["choices"][0]["text"]
        return Characters()(text)["input_ids"]

    for name, found in {"step": stepped(ids, mask), "transformers": theirs, "onnx": written}.items():
        assert torch.equal(found, expected), name
    with ThreadPoolExecutor(batch) as pool:
        over_http = list(pool.map(served, range(batch)))
    assert over_http == expected.tolist()
