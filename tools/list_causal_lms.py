"""Every causal language model of the installed transformers, tiny and random: is each of its attentions matched?

    python tools/list_causal_lms.py                 # all that docs/capture.json does not hold yet
    python tools/list_causal_lms.py --only llama    # one, again
    python tools/list_causal_lms.py --redo failed   # those of one status, again
    python tools/list_causal_lms.py --markdown      # only docs/capture.md, from the table as it is

Each model runs in its own process with a time limit. `recipe="none"` must give the source's logits at batches and
lengths that were not traced and with left padding. One line a model, and docs/capture.json:

    matched    every attention matched, logits equal
    refused    captured or compiled with a specific reason instead
    unequal    silently wrong: a defect
    failed     an error that is not one of linearize's: a defect
    not built  no small config was found, or the source itself does not run from token ids
    no softmax compiled and equal, but there is no attention in it

Rows are summed up by what kind of model they are, on the terminal and in docs/capture.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parent.parent / "docs" / "capture.json"
PAGE = TABLE.with_suffix(".md")
SHAPES = ((1, 1), (3, 20), (1, 33))
TOLERANCE = 1e-4
VOCAB = 97
# Applied where the default config has the field; a family that wants something else stands in SPECIAL.
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "d_model": 32, "n_embd": 32, "embedding_size": 32, "dim": 32,
    "intermediate_size": 64, "ffn_dim": 64, "n_inner": 64, "ffn_hidden_size": 64, "decoder_ffn_dim": 64,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "attention_head_dim": 8,
    "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "n_ctx": 64, "max_seq_length": 64,
    "word_embed_proj_dim": 32, "rotary_dim": 4, "sliding_window": 6, "attention_window": 6, "window_size": 6,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "moe_k": 2, "moe_num_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "num_expert_group": 1, "shared_expert_intermediate_size": 16, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "is_decoder": True,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "query_pre_attn_scalar": 8, "index_head_dim": 8,
    "index_n_heads": 2, "index_topk": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
    "mamba_n_groups": 1, "mamba_expand": 2, "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_d_ssm": 64,
    "ssm_state_size": 8, "state_size": 8, "n_groups": 1, "time_step_rank": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "attention_chunk_size": 6,
    "lru_width": 32, "max_window_layers": 0, "use_sliding_window": True, "intermediate_size_mlp": 64,
    "block_multiple_of": 8, "block_dim": 32, "block_ff_dim": 64, "conv_dim": 32, "shared_intermediate_size": 32,
    "n_ff": 64,
}  # fmt: skip
KEPT = "kept"  # the default of the family
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "falcon": {"head_dim": KEPT},
    "gpt_neox": {"head_dim": KEPT},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "cohere_compass_text": {"layer_types": KEPT, "num_hidden_layers": KEPT},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "gemma3n_text": {"num_kv_shared_layers": 0, "num_hidden_layers": 2, "intermediate_size": 64,
                     "layer_types": ["sliding_attention", "full_attention"], "activation_sparsity_pattern": [0.0, 0.0]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "reformer": {"axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16)},
}  # fmt: skip


# What kind of model a family is, beyond what transformers' own lists of encoders and encoder-decoders tell.
OTHER_CLASSES = {
    "encoder-decoder or bidirectional": (
        "bert-generation", "ernie", "musicgen", "musicgen_melody", "speech_to_text_2", "trocr", "whisper", "xlnet",
    ),
    "state-space or linear attention only": ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"),
    "hybrid of softmax and others": (
        "bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "lfm3",
        "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text",
        "qwen3_next", "qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "zamba", "zamba2", "zaya",
    ),
}  # fmt: skip
SOFTMAX = "decoder-only softmax text models"


def main() -> None:
    arguments = _arguments()
    known: dict[str, Any] = json.loads(TABLE.read_text())["models"] if TABLE.is_file() else {}
    if arguments.markdown:
        PAGE.write_text(page(known))
        return
    kinds = [arguments.only] if arguments.only else causal_kinds()
    if arguments.redo:
        known = {kind: row for kind, row in known.items() if row["status"] != arguments.redo}
    for kind in kinds:
        if kind in known and not arguments.only:
            continue
        known[kind] = row = in_own_process(kind, arguments.timeout)
        print(f"{kind:28} {row['status']:10} {row['seconds']:5.1f} s  {row['detail'][:140]}", flush=True)
        write(known)
    PAGE.write_text(page(known))
    for name, counts in summary(known).items():
        print(f"{name}: {', '.join(f'{count} {status}' for status, count in sorted(counts.items()))}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="the model type to run, though it may be in the table")
    parser.add_argument("--redo", metavar="STATUS", help="forget the rows of this status first")
    parser.add_argument("--markdown", action="store_true", help="write docs/capture.md from the table and stop")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one model")
    return parser.parse_args()


def causal_kinds() -> list[str]:
    """Model types that AutoModelForCausalLM knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def class_of(kind: str) -> str:
    """What kind of model a family is, as the summary counts it."""
    from transformers.models.auto import modeling_auto as auto

    named = next((name for name, kinds in OTHER_CLASSES.items() if kind in kinds), None)
    encoders = {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES}
    return named or ("encoder-decoder or bidirectional" if kind in encoders else SOFTMAX)


def summary(rows: dict[str, Any]) -> dict[str, Counter[str]]:
    """How many models of each class have each status."""
    counts: dict[str, Counter[str]] = {SOFTMAX: Counter(), **{name: Counter() for name in OTHER_CLASSES}}
    for kind, row in rows.items():
        counts[class_of(kind)][row["status"]] += 1
    return counts


def page(rows: dict[str, Any]) -> str:
    """docs/capture.md."""
    statuses = ("matched", "refused", "no softmax", "not built", "failed", "unequal")
    lines = [
        "# Which models are taken",
        "",
        "Every causal language model of transformers, tiny and random, compiled with the recipe `none` and compared",
        "with its source at other batches and lengths and with left padding (1e-4 of the largest logit). Written by",
        "`tools/list_causal_lms.py`; [capture.json](capture.json) has a row for each.",
        "",
        f"| class | models | {' | '.join(statuses)} |",
        f"|---|{'---|' * (len(statuses) + 1)}",
    ]
    for name, counts in summary(rows).items():
        lines.append(f"| {name} | {counts.total()} | {' | '.join(str(counts[status]) for status in statuses)} |")
    lines += ["", "A refused model is left as it is, and says why. Those without every attention matched:", ""]
    lines += ["| model | class | status | why |", "|---|---|---|---|"]
    for kind, row in rows.items():
        if row["status"] not in ("matched", "no softmax"):
            why = row["detail"].replace("|", "\\|")[:160]
            lines.append(f"| {kind} | {class_of(kind)} | {row['status']} | {why} |")
    return "\n".join(lines) + "\n"


def write(rows: dict[str, Any]) -> None:
    import torch
    import transformers

    counts = dict(sorted(Counter(row["status"] for row in rows.values()).items()))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    text = json.dumps({"versions": versions, "counts": counts, "models": dict(sorted(rows.items()))}, indent=1)
    temporary = TABLE.with_suffix(".tmp")
    temporary.write_text(text + "\n")
    os.replace(temporary, TABLE)


def in_own_process(kind: str, timeout: float) -> dict[str, Any]:
    """The row of one model; a process that dies or runs past `timeout` seconds is a row too."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "linearize.capture", "linearize.api"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(kind, sender))
    started = time.monotonic()
    process.start()
    sender.close()
    row = {"status": "failed", "detail": f"no answer within {timeout:g} s"}
    try:
        if receiver.poll(timeout):
            row = receiver.recv()
    except EOFError:
        row = {"status": "failed", "detail": "the process died"}
    process.kill()
    process.join()
    return {**row, "seconds": round(time.monotonic() - started, 1)}


def _child(kind: str, sender: Any) -> None:
    import torch

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    try:
        row = examine(kind)
    except Exception as error:
        row = {"status": "failed", "detail": f"{type(error).__name__}: {_first_line(error)}"}
    sender.send(row)


def examine(kind: str) -> dict[str, Any]:
    """Build, run, compile with recipe none, compare."""
    try:
        model = build(kind)
        run(model, *tokens(2, 13))
    except Exception as error:
        return {"status": "not built", "detail": f"{type(error).__name__}: {_first_line(error)}"}

    import linearize
    from linearize.errors import LinearizeError

    try:
        compiled = linearize.compile(model, "none", tokens=0, progress=False)
    except LinearizeError as error:
        return {"status": "refused", "detail": f"{type(error).__name__}: {_first_line(error)}"}
    return compare(model, compiled)


def compare(model: Any, compiled: Any) -> dict[str, Any]:
    """Logits of the compiled model beside the source's, and what was matched."""
    sites = compiled.program.sites
    row: dict[str, Any] = {
        "captured_by": compiled.program.captured_by,
        "sites": len(sites),
        "masks": sorted({str(site.attention.mask) for site in sites if site.matched}),
        "extras": sorted({extra for site in sites if site.matched for extra in site.extras}),
        "refused": sorted({site.reason for site in sites if not site.matched}),
    }
    worst = {}
    for batch, length in SHAPES:
        ids, mask = tokens(batch, length)
        worst[f"{batch}x{length}"] = difference(compiled(ids).logits, run(model, ids, mask), mask)
    ids, mask = padded()
    worst["left padding"] = difference(compiled(ids, attention_mask=mask).logits, run(model, ids, mask), mask)
    row["worst"] = {name: float(f"{value:.2g}") for name, value in worst.items()}
    unequal = [name for name, value in worst.items() if not value <= TOLERANCE]
    if unequal:
        return {"status": "unequal", "detail": f"{unequal}: {row['worst']}", **row}
    if row["refused"]:
        return {"status": "refused", "detail": "; ".join(row["refused"]), **row}
    status = "matched" if sites else "no softmax"
    return {"status": status, "detail": f"{len(sites)} sites, {', '.join(row['masks'])}", **row}


def build(kind: str) -> Any:
    """The model with the smallest config that the family's fields allow, every matrix of unit gain."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    default = AutoConfig.for_model(kind)
    options = shrink(kind, default)
    for name, sub in dict(default.__dict__).items():
        if hasattr(sub, "model_type") and name in getattr(type(default), "sub_configs", {}):
            own = {key: value for key, value in shrink(kind, sub).items() if not isinstance(value, dict)}
            options[name] = {**own, **SPECIAL.get(kind, {}).get(name, {}), "model_type": sub.model_type}
    config = AutoConfig.for_model(kind, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if parameter.ndim >= 2:
                parameter.copy_(noise * max(parameter.shape[-1], 1) ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    if sum(parameter.numel() for parameter in model.parameters()) > 3e7:
        raise ValueError("no small config: over 30 million parameters remain")
    return model


def shrink(kind: str, default: Any) -> dict[str, Any]:
    """Keyword arguments that make a config of `default`'s class small."""
    fields = {**default.to_dict(), **{name: None for name in getattr(default, "attribute_map", {})}}
    options = {name: value for name, value in SMALL.items() if name in fields}
    for name, value in {"layer_types": None, **fields}.items():
        if name in ("layer_types", "layers_block_type") and isinstance(value, list) and value:
            chosen = list(dict.fromkeys(value))
            options[name] = chosen if len(chosen) > 1 else chosen * 2
            options["num_hidden_layers"] = len(options[name])
    if "kv_lora_rank" in fields:  # latent attention has as many keys as queries, and derives its head dims
        options |= {"num_key_value_heads": 4, "num_attention_heads": 4, "head_dim": KEPT}
    options |= SPECIAL.get(kind, {})
    if options.get("sliding_window") and fields.get("sliding_window") is None and "layer_types" not in options:
        options.pop("sliding_window")
    return {name: value for name, value in options.items() if value is not KEPT}


def tokens(batch: int, length: int) -> Any:
    import torch

    ids = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(length))
    return ids, torch.ones_like(ids)


def padded() -> Any:
    ids, mask = tokens(3, 17)
    for row, padding in enumerate((0, 3, 12)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return ids, mask


def run(model: Any, ids: Any, mask: Any) -> Any:
    """The source's logits, called as its users call it."""
    import inspect

    import torch

    accepted = inspect.signature(model.forward).parameters
    options = {"attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        return model(ids, **{name: value for name, value in options.items() if name in accepted}).logits


def difference(actual: Any, expected: Any, mask: Any) -> float:
    """max |actual - expected| over max |expected| at real tokens; not a number counts as infinite."""
    if actual.shape != expected.shape:
        return float("inf")
    real = mask.bool()
    worst = ((actual - expected)[real].abs().max() / expected[real].abs().max().clamp_min(1e-9)).item()
    return worst if worst == worst else float("inf")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""


if __name__ == "__main__":
    main()
