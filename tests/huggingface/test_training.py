"""Trainer and PEFT on a compiled model: losses fall, checkpoints resume, adapters merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from linearize.huggingface.model import LinearizedForCausalLM
from tests import zoo

RECIPE = "lolcats{window=5}"


def fresh(name: str = "llama") -> LinearizedForCausalLM:
    """With weights of its own: a compiled model shares its source's, and the zoo's are read by every test."""
    torch.manual_seed(0)
    return copy.deepcopy(zoo.compile_again(name, RECIPE, tokens=0)).to_transformers()


def rows() -> list[dict[str, torch.Tensor]]:
    """Sequences that repeat, so that there is something to learn."""
    found = zoo.tokens(16, 6, seed=3).repeat(1, 3)
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in found]


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.found.append(logs["loss"])


def train(model: Any, folder: Path, steps: int, rate: float, resume: Any = None, losses: Any = None) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=20, per_device_train_batch_size=4, learning_rate=rate, logging_steps=1,
        save_steps=10, report_to=[], disable_tqdm=True, use_cpu=True, seed=0, lr_scheduler_type="constant",
    )  # fmt: skip

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    callbacks = [Stop(), *([losses] if losses else [])]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("name", "targets"), [("llama", ["q_proj", "v_proj", "up_proj"]), ("gpt2", ["c_attn", "c_fc"])]
)
def test_lora_trains_and_merges(name: str, targets: list[str], tmp_path: Path) -> None:
    ids = zoo.tokens(2, 9)
    base = fresh(name)
    frozen = {key: value.clone() for key, value in base.state_dict().items()}
    adapted = get_peft_model(base, LoraConfig(target_modules=targets, task_type="CAUSAL_LM", r=4, lora_alpha=16))
    losses = Losses()
    train(adapted, tmp_path / "run", 20, 2e-2, losses=losses)
    assert len(losses.found) == 20
    assert sum(losses.found[-4:]) / 4 < 0.8 * sum(losses.found[:4]) / 4
    adapted.eval()
    with torch.no_grad():
        expected = adapted(ids).logits
        adapted.save_pretrained(tmp_path / "adapter")
        reloaded = PeftModel.from_pretrained(fresh(name), tmp_path / "adapter").eval()
        assert zoo.difference(reloaded(ids).logits, expected) <= 1e-5
        merged = adapted.merge_and_unload()
        assert zoo.difference(merged(ids).logits, expected) <= 1e-4
        assert set(merged.state_dict()) == set(frozen)
        merged.save_pretrained(tmp_path / "merged")
        again = LinearizedForCausalLM.from_pretrained(tmp_path / "merged")
        assert zoo.difference(again(ids).logits, expected) <= 1e-4


def test_a_trainers_checkpoint_resumes_where_it_stopped(tmp_path: Path) -> None:
    whole = train(fresh(), tmp_path / "whole", 20, 5e-3).model
    train(fresh(), tmp_path / "halves", 10, 5e-3)
    resumed = train(fresh(), tmp_path / "halves", 20, 5e-3, resume=True).model
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=name, atol=1e-6, rtol=1e-5)
    saved = LinearizedForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-20")
    ids = zoo.tokens(2, 9)
    with torch.no_grad():
        assert zoo.difference(saved(ids).logits, whole.eval()(ids).logits) <= 1e-6


def test_the_loss_is_the_sources() -> None:
    ids = zoo.tokens(3, 11)
    source: Any = zoo.source("llama")
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    model = zoo.compiled("llama", "none").to_transformers()
    with torch.no_grad():
        expected = source(ids, attention_mask=mask, labels=labels).loss
        assert abs(float(model(ids, attention_mask=mask, labels=labels).loss - expected)) <= 1e-5
