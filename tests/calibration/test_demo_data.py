"""What the demo measures on was held out, and its recall needs what lies beyond the window."""

import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import linearize
from linearize.calibration import demo
from linearize.errors import DataError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from linearize.capture import hf

    return hf.load_tokenizer(linearize.demo_model_dir())


def test_the_text_is_what_training_held_out() -> None:
    spec = importlib.util.spec_from_file_location("train_demo_model", ROOT / "tools" / "train_demo_model.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tool  # its dataclasses look themselves up there
    spec.loader.exec_module(tool)
    train, held, _ = tool.read_documents()
    documents = set(demo.held_out_documents())
    assert documents <= set(held)
    assert len(documents) >= len(held) - 1  # the licence's text may be among them
    assert not documents & set(train)


def test_a_python_without_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no standard library sources"):
        demo.held_out_documents(tmp_path)


def test_text_rows_start_with_bos_and_do_not_overlap(tokenizer: Any) -> None:
    rows = demo.text_rows(tokenizer, ["x = 1\n" * 100, "y = 2\n" * 100], rows=6, length=32)
    assert rows.shape == (6, 32)
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    assert "x = 1" in tokenizer.decode(rows[0])
    assert "y = 2" in tokenizer.decode(rows[-1])


def test_too_little_text_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="not 50"):
        demo.text_rows(tokenizer, ["short"], rows=50, length=32)


def test_recall_reaches_from_the_window_to_400(tokenizer: Any) -> None:
    batches = demo.recall_batches(1024, window=32, rows=4, seed=1)
    distances = torch.cat([batch.distance[batch.mask] for batch in batches])
    edges = demo.recall_edges(32)
    assert edges == [33, 65, 129, 401]
    assert all(((distances >= low) & (distances < high)).sum() > 100 for low, high in pairwise(edges))
    assert ((distances > 32) & (distances <= 400)).float().mean() > 0.9
    assert all(int(batch.input_ids.max()) < 1024 for batch in batches)
    assert torch.equal(batches[2].input_ids, demo.recall_batches(1024, 32, 4, seed=1)[2].input_ids)
