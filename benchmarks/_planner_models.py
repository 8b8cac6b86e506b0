"""Four models to plan: the embedded one, and three of other shapes that are trained here for a few minutes.

The text is the standard library without the files that the embedded model is measured on, read with its tokenizer; in
every fourth row a segment repeats, so that the models learn to look far back.
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import linearize
from linearize.calibration.demo import held_out_documents, text_rows
from linearize.calibration.samples import repeat_segments

LENGTH, BATCH, STEPS, RATE = 512, 4, 160, 3e-3
DOCUMENTS = 400


def model(name: str, folder: Path) -> nn.Module:
    """`demo`, `qwen3` (grouped heads, norms of q and k), `gpt2` (learned positions, a kv head a query head) or `neox`
    (half the dimensions rotated, attention beside the MLP)."""
    from transformers import AutoModelForCausalLM

    if name == "demo":
        return AutoModelForCausalLM.from_pretrained(linearize.demo_model_dir()).eval()
    place = folder / name
    if not place.is_dir():
        made = fresh(name)
        train(made, name)
        made.save_pretrained(place)
    return AutoModelForCausalLM.from_pretrained(place).eval()


def fresh(name: str) -> Any:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    torch.manual_seed(0)
    if name == "qwen3":
        config = Qwen3Config(
            vocab_size=1024, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=3, head_dim=16, max_position_embeddings=4096, tie_word_embeddings=True,
            initializer_range=0.06, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        return Qwen3ForCausalLM(config)
    if name == "neox":
        parallel = GPTNeoXConfig(
            vocab_size=1024, hidden_size=96, num_hidden_layers=4, num_attention_heads=6, intermediate_size=256,
            rotary_pct=0.5, max_position_embeddings=4096, initializer_range=0.06, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        return GPTNeoXForCausalLM(parallel)
    shape = GPT2Config(
        vocab_size=1024, n_embd=96, n_layer=3, n_head=4, n_positions=4096, initializer_range=0.06, bos_token_id=0,
        eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(shape)


def train(made: Any, name: str) -> None:
    data = training_rows()
    optimiser = torch.optim.AdamW(made.parameters(), lr=RATE, weight_decay=0.02)
    generator = torch.Generator().manual_seed(0)
    made.train()
    for step in range(STEPS):
        factor = min(1.0, (step + 1) / 20) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        for group in optimiser.param_groups:
            group["lr"] = RATE * factor
        ids = data[torch.randint(0, len(data), (BATCH,), generator=generator)]
        ids = repeat_segments(ids, generator)
        logits = made(ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimiser.step()
        if step % 20 == 0 or step == STEPS - 1:
            print(f"{name}: step {step}, loss {loss.item():.3f}", flush=True)


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(linearize.demo_model_dir())


def training_rows() -> Tensor:
    held = set(held_out_documents())
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(folder.glob("*.py"))[:DOCUMENTS]:
        text = path.read_text(encoding="utf-8", errors="replace").strip("\n") + "\n"
        texts += [text] if text not in held else []
    ids = [token for text in texts for token in tokenizer()(text, verbose=False)["input_ids"]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)


def rows_for(name: str, length: int, rows: int) -> list[Tensor]:
    """[1, length] each, of held-out text; every other one repeats a segment of itself."""
    found = text_rows(tokenizer(), held_out_documents(), rows, length)
    generator = torch.Generator().manual_seed(0)
    for at in range(1, rows, 2):
        found[at] = repeat_segments(found[at].repeat(4, 1), generator)[3]
    return list(found.split(1))
