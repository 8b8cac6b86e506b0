"""Tiny random models of several families, and a GPT by somebody who never heard of this project."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

VOCAB = 61
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    return {"llama": llama, "gpt2": gpt2, "mistral": mistral, "qwen3": qwen3, "plain": Plain}[family]().eval()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True, bos_token_id=1, eos_token_id=[2, 3])
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=512))


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SIZES, **HEADS, sliding_window=16))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS, head_dim=8))


class Plain(nn.Module):
    """Learned positions and F.scaled_dot_product_attention; takes nothing but token ids."""

    def __init__(self, positions: int = 512, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(VOCAB, width)
        self.positions = nn.Embedding(positions, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, input_ids):
        batch, length = input_ids.shape
        x = self.tokens(input_ids) + self.positions(torch.arange(length, device=input_ids.device))
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.mix(y.transpose(1, 2).reshape(batch, length, -1)))
