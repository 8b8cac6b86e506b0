"""The zoo: tiny random decoder-only models of many families, each with what is expected of it today.

Weights are drawn wide (`loud`), so that attention is far from uniform and an ignored feature moves the logits. Every
model is captured once a session, see `captured`; `compiled` compiles from that capture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import linearize
from linearize.capture.calling import find_logits
from linearize.program import MASK, Program
from linearize.runtime.model import LinearizedModel
from tests import plain_models as plain

VOCAB, LAYERS = 97, 2
LEFT_OUT = object()  # of a family that computes or does not take this field


@dataclass(frozen=True)
class Entry:
    """One model. `matched` and `refused` count its attentions; `masks` are those of the matched ones, in order, one
    name standing for all; every reason of a refusal contains `reason`; `extras` are among each matched site's.

    `error` is the text of what capture or compile must raise, `whole_only` why the compiled model runs on whole
    sequences alone, `carried` the sizes of the states (one row, 0 tokens) of what mixes tokens and is no matched
    attention. `limit` is the longest context of its position table. `tolerance` on logits, relative to the largest.
    """

    name: str
    build: Callable[[], nn.Module]
    matched: int = LAYERS
    refused: int = 0
    masks: tuple[str, ...] = ("causal",)
    extras: tuple[str, ...] = ()
    reason: str = ""
    error: str = ""
    whole_only: str = ""
    carried: tuple[tuple[int, ...], ...] = ()
    limit: int | None = None
    last_only: bool = False
    family: str = field(default="plain")

    @property
    def steps(self) -> bool:
        return not (self.error or self.whole_only)

    def mask_of(self, site: int) -> str:
        return self.masks[site] if len(self.masks) > 1 else self.masks[0]


def loud(model: nn.Module, seed: int = 0) -> nn.Module:
    """Redraw every parameter: matrices with unit gain, vectors moved off their start, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.ndim >= 2:
                parameter.copy_(noise * max(parameter.shape[-1], 1) ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def hf(kind: str, **overrides: Any) -> Callable[[], nn.Module]:
    """A builder of transformers' causal language model of that kind, 4 heads of 8, vocabulary 97."""

    def build() -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        options: dict[str, Any] = {
            "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        options = {key: value for key, value in {**options, **overrides}.items() if value is not LEFT_OUT}
        config = AutoConfig.for_model(kind, **options)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return loud(AutoModelForCausalLM.from_config(config))

    return build


def written(build: Callable[..., nn.Module], *args: Any, **options: Any) -> Callable[[], nn.Module]:
    """A builder of one of `plain_models`."""

    def seeded() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return loud(build(*args, **options))

    return seeded


GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
MLA = {
    "num_key_value_heads": 4, "head_dim": LEFT_OUT, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 5, "n_routed_experts": 4,
    "moe_intermediate_size": 16,
}  # fmt: skip
SHALLOW = {"num_hidden_layers": 1}
LOCAL = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

# name, kind, options, what is expected beyond 2 matched causal sites
DEEP: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("llama", "llama", {}, {"extras": ("gqa", "rope-half(8)", "padding")}),
    ("gpt2", "gpt2", GPT2, {"extras": ("fused-qkv", "padding"), "limit": 64}),
    ("mistral", "mistral", {"sliding_window": 6}, {"masks": ("sliding(6)",), "extras": ("gqa", "rope-half(8)")}),
    ("qwen3", "qwen3", {}, {"extras": ("gqa", "rope-half(8)", "qk-norm")}),
    ("gpt_neo", "gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                            "window_size": 6}, {"masks": ("causal", "sliding(6)"), "limit": 64}),
    # transformers 5.17 would take SDPA, which drops the soft cap
    ("gemma2", "gemma2",
     {**LOCAL, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0, "attn_implementation": "eager"},
     {"masks": ("sliding(6)", "causal"), "extras": ("gqa", "softcap(3)")}),
    ("gemma3", "gemma3_text", LOCAL, {"masks": ("sliding(6)", "causal"), "extras": ("gqa", "qk-norm")}),
    ("cohere2", "cohere2", LOCAL, {"masks": ("sliding(6)", "causal")}),
    ("smollm3", "smollm3", {"no_rope_layers": [1, 0]}, {"extras": ("gqa",)}),
    ("deepseek_v3", "deepseek_v3", {**MLA, "n_group": 1, "topk_group": 1}, {"extras": ("rope-half(8)",)}),
    ("gpt_oss", "gpt_oss", {**EXPERTS, **LOCAL},
     {"masks": ("sliding(6)", "causal"), "extras": ("gqa", "sinks", "padding")}),
)  # fmt: skip

# the long tail, of one layer each
TAIL: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("llama_mqa", "llama", {"num_key_value_heads": 1}, {"extras": ("mqa",)}),
    ("llama_rope_scaled", "llama", {"rope_parameters": LLAMA3_ROPE}, {"extras": ("gqa", "rope-half(8)")}),
    ("mistral_full", "mistral", {"sliding_window": None}, {"extras": ("gqa",)}),
    ("gpt_bigcode", "gpt_bigcode", {**GPT2, "n_layer": 1}, {"extras": ("mqa",), "limit": 64}),
    ("gpt_neox", "gpt_neox", {"head_dim": LEFT_OUT}, {"extras": ("fused-qkv", "rope-half(2)")}),
    ("gptj", "gptj", {**GPT2, "n_layer": 1, "rotary_dim": 4}, {"extras": ("rope-interleaved(4)",)}),
    ("codegen", "codegen", {**GPT2, "n_layer": 1, "rotary_dim": 4, "n_ctx": 64},
     {"extras": ("fused-qkv", "rope-interleaved(4)")}),
    ("opt", "opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, {"extras": ("padding",), "limit": 64}),
    ("biogpt", "biogpt", {}, {"limit": 64}),
    ("mixtral", "mixtral", EXPERTS, {"extras": ("gqa",)}),
    ("qwen2", "qwen2", {}, {"extras": ("gqa", "rope-half(8)")}),
    ("qwen3_moe", "qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
     {"extras": ("qk-norm",)}),
    ("phi", "phi", {"partial_rotary_factor": 0.5}, {"extras": ("rope-half(4)",)}),
    ("phi3", "phi3", {}, {"extras": ("fused-qkv", "gqa", "rope-half(8)")}),
    ("gemma", "gemma", {}, {"extras": ("gqa", "rope-half(8)")}),
    ("stablelm", "stablelm", {"partial_rotary_factor": 0.5}, {"extras": ("gqa", "rope-half(4)")}),
    ("starcoder2", "starcoder2", {}, {"extras": ("gqa",)}),
    ("cohere", "cohere", {}, {"extras": ("gqa", "rope-interleaved(8)")}),
    ("olmo2", "olmo2", {}, {"extras": ("gqa", "qk-norm")}),
    ("granite", "granite", {"attention_multiplier": 0.3}, {"extras": ("gqa",)}),
    ("falcon", "falcon", {"new_decoder_architecture": False, "multi_query": True, "head_dim": LEFT_OUT},
     {"extras": ("mqa",)}),
    ("falcon_new", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": LEFT_OUT},
     {"extras": ("fused-qkv", "gqa", "rope-half(8)")}),
    ("falcon_alibi", "falcon", {"new_decoder_architecture": False, "multi_query": True, "alibi": True,
                                "head_dim": LEFT_OUT}, {"extras": ("mqa", "alibi", "padding")}),
    ("bloom", "bloom", {"n_layer": 1, "n_head": 4}, {"extras": ("fused-qkv", "alibi", "padding")}),
    ("mpt", "mpt", {"d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 64},
     {"extras": ("fused-qkv", "alibi", "padding")}),
    ("glm", "glm", {"partial_rotary_factor": 0.5}, {"extras": ("gqa", "rope-interleaved(4)")}),
    ("glm4", "glm4", {"partial_rotary_factor": 0.5}, {"extras": ("gqa", "rope-interleaved(4)")}),
    ("nemotron", "nemotron", {"partial_rotary_factor": 0.5}, {"extras": ("gqa",)}),
    ("persimmon", "persimmon", {"partial_rotary_factor": 0.5}, {"extras": ("fused-qkv", "qk-norm")}),
    ("helium", "helium", {}, {"extras": ("gqa",)}),
    ("apertus", "apertus", {}, {"extras": ("gqa", "qk-norm")}),
    ("deepseek_v2", "deepseek_v2", MLA, {}),
    ("xglm", "xglm", {"d_model": 32, "ffn_dim": 64, "num_layers": 1, "attention_heads": 4},
     {"extras": ("padding",)}),
    ("llama4", "llama4_text", {"num_hidden_layers": 4, "attention_chunk_size": 6, "num_local_experts": 4,
                               "intermediate_size_mlp": 64, "rope_parameters": {"rope_type": "default",
                               "rope_theta": 10000.0}},
     {"matched": 4, "masks": ("chunked(6)", "chunked(6)", "chunked(6)", "causal"), "extras": ("gqa", "padding")}),
    ("roberta", "roberta", {"is_decoder": True}, {"carried": ((1,),), "limit": 63}),  # positions counted in the tokens
    ("lfm2", "lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"], "block_ff_dim": 64,
                      "block_multiple_of": 8}, {"extras": ("gqa", "qk-norm"), "carried": ((32, 2),)}),
    ("olmoe", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, {"extras": ("qk-norm",)}),
    ("hunyuan", "hunyuan_v1_dense", {}, {"extras": ("qk-norm",)}),
)  # fmt: skip

TRANSFORMERS: tuple[Entry, ...] = (
    *(Entry(name, hf(kind, **options), family="transformers", **expected) for name, kind, options, expected in DEEP),
    *(
        Entry(name, hf(kind, **{**SHALLOW, **options}), family="transformers", **{"matched": 1, **expected})
        for name, kind, options, expected in TAIL
    ),
)


def _plain(name: str, build: Callable[..., nn.Module], *args: Any, **expected: Any) -> Entry:
    return Entry(name, written(build, *args), **{"matched": 1, **expected})


LEARNED, BARE = plain.LearnedPositions, plain.Decoder
PLAIN: tuple[Entry, ...] = (
    _plain("nano_gpt", plain.NanoGPT, matched=2, extras=("fused-qkv",), limit=64),
    _plain("nano_gpt_last", plain.NanoGPT, None, True, matched=2, extras=("fused-qkv",), limit=64, last_only=True),
    _plain("llama_from_scratch", plain.LlamaFromScratch, matched=2, extras=("gqa", "rope-interleaved(8)"), limit=64),
    _plain("rotary_in_forward", BARE, plain.RotaryInForward, extras=("gqa", "rope-half(8)")),
    _plain("rotary_tables", BARE, plain.RotaryTables, extras=("rope-interleaved(4)",), limit=64),
    _plain("float_mask_buffer", LEARNED, plain.FloatMaskBuffer, limit=64),
    _plain("bool_mask", LEARNED, plain.BoolMaskOnTheFly, limit=64),
    _plain("position_id_buffer", plain.PositionIdBuffer, limit=64),
    _plain("position_parameter", plain.PositionParameter, limit=64),
    _plain("multi_query", LEARNED, plain.MultiQuery, extras=("mqa",), limit=64),
    _plain("enable_gqa", LEARNED, plain.EnableGQA, extras=("gqa",), limit=64),
    _plain("repeat_interleave", LEARNED, plain.RepeatInterleave, extras=("gqa",), limit=64),
    _plain("tiled_heads", LEARNED, plain.TiledHeads, limit=64),
    _plain("banded_window", LEARNED, plain.BandedWindow, masks=("sliding(6)",), limit=64),
    _plain("differential", LEARNED, plain.Differential, matched=2, limit=64),
    _plain("gated_qk_norm", LEARNED, plain.GatedOutput, extras=("qk-norm",), limit=64),
    _plain("shared_block", plain.SharedBlock, matched=2, extras=("fused-qkv",), limit=64),
    _plain("one_hot_tokens", plain.OneHotTokens, plain.FusedSDPA),
    _plain("dict_output", plain.DictOutput, plain.FusedSDPA, limit=64),
    _plain("dataclass_output", plain.DataclassOutput, plain.FusedSDPA, limit=64),
    _plain("config_object", plain.WithConfigObject, limit=64),
    _plain("experts_with_router", plain.ExpertsWithRouter, limit=64),
    _plain("frozen_half", plain.FrozenHalf, limit=64),
    _plain("tutorial_transformer", plain.TutorialTransformer, True, matched=2, limit=64),
    _plain("manual_causal", LEARNED, plain.ManualCausal, limit=64),
    _plain("soft_capped", LEARNED, plain.SoftCapped, extras=("softcap(3)",), limit=64),
    _plain("sink_logits", LEARNED, plain.SinkLogits, extras=("sinks",), limit=64),
    _plain("gated_by_size", LEARNED, plain.GatedBySize, extras=("sinks",), limit=64),
    _plain("alibi_manual", BARE, plain.AlibiManual, extras=("alibi",)),
    _plain("alibi_sdpa", BARE, plain.AlibiSDPA, extras=("alibi",)),
    _plain("chunked", LEARNED, plain.ChunkedLocal, masks=("chunked(6)",), limit=64),
    # the two products and the softmax, however they are spelled
    _plain("einsum_causal", LEARNED, plain.EinsumCausal, limit=64),
    _plain("heads_last", LEARNED, plain.HeadsLast, limit=64),
    _plain("keys_first", LEARNED, plain.KeysFirst, limit=64),
    _plain("multi_query_einsum", LEARNED, plain.MultiQueryEinsum, extras=("mqa",), limit=64),
    _plain("grouped_einsum", LEARNED, plain.GroupedEinsum, extras=("gqa",), limit=64),
    _plain("grouped_matmul", LEARNED, plain.GroupedMatmul, extras=("gqa",), limit=64),
    _plain("softmax_by_hand", LEARNED, plain.SoftmaxByHand, limit=64),
    _plain("log_softmax", LEARNED, plain.LogSoftmax, limit=64),
    _plain("one_head", LEARNED, plain.OneHead, limit=64),
    _plain("merged_batch_and_heads", LEARNED, plain.MergedBatchAndHeads, limit=64),
    _plain("heads_before_batch", LEARNED, plain.HeadsBeforeBatch, limit=64),
    _plain("torch_multihead", LEARNED, plain.TorchMultihead, extras=("fused-qkv",), limit=64),
    _plain("torch_multihead_weights", LEARNED, functools.partial(plain.TorchMultihead, True), limit=64),
    _plain("functional_multihead", LEARNED, plain.FunctionalMultihead, limit=64),
    _plain("mask_then_scale", LEARNED, plain.MaskThenScale, limit=64),
    _plain("softmax_in_float32", LEARNED, plain.SoftmaxInFloat32, limit=64),
    # projections
    _plain("transposed_weights", LEARNED, plain.TransposedWeights, extras=("fused-qkv",), limit=64),
    _plain("interleaved_by_head", LEARNED, plain.InterleavedByHead, extras=("fused-qkv",), limit=64),
    _plain("interleaved_by_group", LEARNED, plain.InterleavedByGroup, extras=("fused-qkv", "gqa"), limit=64),
    _plain("by_shard", LEARNED, plain.ByShard, extras=("fused-qkv",), limit=64),
    _plain("adapted", LEARNED, plain.Adapted, limit=64),
    _plain("norm_after_core", LEARNED, plain.NormAfterCore, limit=64),
    # rotation in other layouts
    _plain("complex_rotary", BARE, plain.ComplexRotary, extras=("gqa", "rope-interleaved(8)"), limit=64),
    _plain("rotary_before_transpose", BARE, plain.RotaryBeforeTranspose, extras=("rope-interleaved(4)",), limit=64),
    _plain("shared_rotary_key", BARE, plain.SharedRotaryKey, extras=("rope-half(4)",), limit=64),
    _plain("repeat_then_rotate", BARE, plain.RepeatThenRotate, extras=("gqa", "rope-half(8)"), limit=64),
    _plain("norm_after_rotary", BARE, plain.NormAfterRotary, extras=("gqa", "qk-norm"), limit=64),
    _plain("plain_norm_after_rotary", BARE, plain.PlainNormAfterRotary, extras=("gqa", "rope-interleaved(8)"),
           limit=64),
    # blocks put together in other ways
    _plain("parallel_fused", LEARNED, plain.ParallelFused, extras=("mqa",), limit=64),
    _plain("parallel_block", LEARNED, plain.ParallelBlock, extras=("fused-qkv",), limit=64),
    _plain("post_norm", plain.PostNorm, extras=("fused-qkv",), limit=64),
    _plain("sandwich", plain.Sandwich, extras=("fused-qkv",), limit=64),
    _plain("course", plain.Course, matched=2, limit=64),
    # refused, left as they are, and right
    _plain("prefix", LEARNED, plain.PrefixVisible, matched=0, refused=1, reason="its mask is prefix(3)",
           whole_only="looks ahead; what it gives for the first 1 token"),
    _plain("strided", LEARNED, plain.Strided, matched=0, refused=1, reason="hides 576 past ones", limit=64,
           carried=((0, 32),) * 2),
    _plain("thresholded", LEARNED, plain.Thresholded, matched=0, refused=1, reason="depends on the hidden states",
           limit=64, carried=((0, 32),) * 2),
    _plain("hidden_bias", LEARNED, plain.HiddenBias, matched=0, refused=1, reason="depends on the hidden states",
           limit=64, carried=((0, 4), (0, 32), (0, 32))),
    _plain("memory_tokens", LEARNED, plain.MemoryTokens, matched=0, refused=1, reason="the key axis has length 5",
           limit=64),
    _plain("relative_bias", LEARNED, plain.RelativeBias, matched=0, refused=1, reason="not linear in the distance",
           limit=64, carried=((0, 32),) * 2),
    _plain("queries_in_two_pieces", LEARNED, plain.QueriesInTwoPieces, matched=0, refused=2,
           reason="the queries are a part of the sequence", limit=64, carried=((0, 32),) * 2),
    # no softmax, or a memory outside of the attention: carried by value
    _plain("linear_attention", LEARNED, plain.LinearAttention, matched=0, limit=64,
           carried=((0, 32), (4, 0, 8))),
    _plain("cumsum_positions", plain.CumsumPositions, plain.FusedSDPA, limit=64, carried=((1,),)),
    _plain("reversed_positions", plain.ReversedPositions, plain.FusedSDPA, whole_only="arange looks ahead"),
    _plain("token_shift", plain.TokenShift, plain.FusedSDPA, carried=((1, 32),)),
    _plain("conv_and_attention", plain.Mixed, plain.ShortConv, limit=64, carried=((3, 32),)),
    _plain("average_and_attention", plain.Mixed, plain.MovingAverage, limit=64, carried=((0, 32),)),
    _plain("cumulative_and_attention", plain.Mixed, plain.CumulativeLinear, limit=64,
           carried=((4, 1, 8, 8), (4, 1, 8))),
    _plain("long_conv_and_attention", plain.Mixed, plain.LongConv, limit=64, carried=((0, 32),)),
    _plain("conv_beside_attention", plain.Mixed, plain.Parallel, matched=2, limit=64, carried=((3, 32),)),
    _plain("top_of_the_past", plain.Mixed, plain.RunningMaximum, limit=64, carried=((0, 32),)),
    # not taken at all
    _plain("bidirectional", LEARNED, plain.Bidirectional, error="is not a decoder: changing the last token"),
    _plain("no_logits", plain.NoLogits, error=r"returned a float32 tensor of shape \[2, 32\], not logits"),
    _plain("branch_on_values", plain.BranchOnValues, plain.FusedSDPA, error="cannot trace BranchOnValues"),
    _plain("branch_on_length", plain.BranchOnLength, plain.FusedSDPA, error="at a static length 13 only"),
    _plain("tutorial_detects_mask", plain.TutorialTransformer, error="cannot trace .* in module 'encoder'"),
    Entry("bert", hf("bert", is_decoder=False), error="is not a decoder", family="transformers"),
    Entry("t5", lambda: _t5(), error="is an encoder-decoder", family="transformers"),
)  # fmt: skip

ENTRIES: tuple[Entry, ...] = TRANSFORMERS + PLAIN
BY_NAME = {entry.name: entry for entry in ENTRIES}


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config)


@functools.cache
def source(name: str) -> nn.Module:
    """The model of that name, the same object all session; leave it as it is."""
    return BY_NAME[name].build()


@functools.cache
def captured(name: str) -> Program:
    """Its captured, normalised and matched program."""
    return linearize.capture(source(name))


@functools.cache
def compiled(name: str, recipe: str = "none") -> LinearizedModel:
    """Compiled by `recipe` without fitting, from the session's capture."""
    return compile_again(name, recipe, tokens=0)


def compile_again(name: str, recipe: Any = "none", **options: Any) -> LinearizedModel:
    """`linearize.compile` of a zoo model that is not captured a second time."""
    program = captured(name)
    with mock.patch("linearize.api.capture", return_value=program):
        return linearize.compile(source(name), recipe, progress=False, **options)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """int64 [batch, length] below the zoo's vocabulary; 0 (the padding id) is left out."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1000 * seed + length))


def source_logits(name: str, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the source itself returns, called as its users call it."""
    inputs: dict[str, Any] = {}
    if MASK in captured(name).input_names() and BY_NAME[name].family == "transformers":
        inputs["use_cache"] = False
        if mask is not None:
            inputs["attention_mask"] = mask
    with torch.no_grad():
        return find_logits(source(name)(ids, **inputs))


def difference(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| over max |expected|; shapes must agree, NaN counts as infinite."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} is not {list(expected.shape)}"
    worst = ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-9)).item()
    return worst if worst == worst else float("inf")
