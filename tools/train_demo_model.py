"""Train the small Llama that ships in linearize/demo_model, from text that every CPython 3.11 carries.

The model has to do two things well enough to measure what a linearized mixer loses: predict text (the standard
library's sources) and recall from its context (repeated segments and key-value pairs). Recall by induction appears
suddenly, and only where the signal is dense, so the phases start short, with a small alphabet, and then widen.

    python tools/train_demo_model.py --work build/demo_model            # the whole run; call again to resume
    (on a busy machine set OMP_WAIT_POLICY=passive, so that threads that wait do not spin)
    python tools/train_demo_model.py --work build/quick --out build/quick/model --quick

Everything random comes from one seeded generator that is kept in the checkpoint, so a resumed run sees the same data.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from linearize.calibration.recall import (  # noqa: E402  (the repository need not be installed)
    RecallBatch,
    cat_batches,
    key_value_pairs,
    recall_accuracy,
    repeated_segments,
)

SEED = 20240711
VOCAB = 1024
BOS, EOS, PAD = 0, 1, 2  # ids of SPECIAL; recall draws from the ids above
SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
SIZE_LIMIT = 7_800_000  # bytes of the whole shipped directory

MODEL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "dtype": "float32",
    # 1 / sqrt(hidden): with the usual 0.02 and tied embeddings no logit can exceed 13.9 * 0.28, and copying comes late.
    "initializer_range": 0.072,
}


@dataclass(frozen=True)
class Phase:
    """One stretch of training: constant data, linear warm-up then cosine from lr to lr_end.

    shares: rows per batch of (text, repeated segments, key-value pairs). symbols: each recall group draws n from it and
    uses the ids 3 .. 3 + n - 1. alphabet, segment, pairs: inclusive bounds, uniform. gap_share: share of the recall
    groups with filler in between.
    """

    name: str
    steps: int
    seq_len: int
    shares: tuple[int, int, int]
    lr: float
    lr_end: float
    symbols: tuple[int, ...]
    alphabet: tuple[int, int]
    segment: tuple[int, int]
    pairs: tuple[int, int]
    gap_share: float
    planned: int = 0  # the cosine runs over this many steps when the phase was cut short, else over `steps`


ALL = VOCAB - 3
PHASES: list[Phase] = [
    Phase("spark", 200, 128, (5, 6, 5), 2e-3, 2e-3, (ALL,), (48, ALL), (4, 48), (4, 10), 0.0),
    Phase("whole", 200, 256, (4, 2, 2), 2e-3, 2e-3, (ALL,), (48, ALL), (4, 96), (4, 24), 0.25),
    Phase("lengthen", 300, 512, (3, 1, 1), 2e-3, 1.8e-3, (ALL,), (256, ALL), (8, 240), (4, 48), 0.5),
    Phase("settle", 500, 512, (3, 1, 1), 1.8e-3, 6e-4, (ALL,), (512, ALL), (8, 240), (8, 96), 0.6, planned=800),
    Phase("long", 150, 1024, (2, 1, 1), 1.2e-3, 2e-4, (ALL,), (768, ALL), (16, 480), (16, 192), 0.6),
    Phase("longest", 30, 2048, (1, 1, 1), 2e-4, 2e-5, (ALL,), (768, ALL), (32, 960), (32, 320), 0.6),
]
WARMUP = 40
AUTOCAST = True  # bfloat16 matrix products, float32 weights: 15 to 40 % more tokens per CPU second with AVX512-BF16
WEIGHT_DECAY = 0.02
# What recall cannot predict (a first copy, the queries) is kept at a low weight, so that samples from BOS still contain
# such sequences; the first tokens count fully, because there the model decides which kind of sequence it is writing.
UNPREDICTABLE_WEIGHT = 0.1
OPENING = 8

# Left out: tests and bundled wheels, generated tables, and what differs from build to build.
SKIP_DIRS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "turtledemo", "_bundled"}
SKIP_PREFIXES = ("_sysconfigdata", "config-")
HOLD_OUT_PER_MILLE = 30


# ---------------------------------------------------------------------------------------------------------- text ----


def wanted(relative: Path) -> bool:
    """True for the standard library files to train on."""
    return not any(part in SKIP_DIRS or part.startswith(SKIP_PREFIXES) for part in relative.parts)


def read_documents() -> tuple[list[str], list[str], str]:
    """(training documents, held-out documents, SHA-256 of all of them), split by a hash of the relative name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = sorted(p.relative_to(root) for p in root.rglob("*.py") if wanted(p.relative_to(root)))
    names += [Path("LICENSE.txt")] if (root / "LICENSE.txt").exists() else []
    train, held, digest = [], [], hashlib.sha256()
    for name in names:
        text = (root / name).read_text(encoding="utf-8", errors="replace").strip("\n") + "\n"
        digest.update(f"{name.as_posix()}\0{text}\0".encode())
        bucket = int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16) % 1000
        (held if bucket < HOLD_OUT_PER_MILLE else train).append(text)
    return train, held, digest.hexdigest()


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE (any text round-trips) that puts BOS in front."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(documents, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[BOS]} $A", pair=f"{SPECIAL[BOS]} $A $B", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        pad_token=SPECIAL[PAD],
        model_max_length=MODEL["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """One stream of ids, int64 [N]: BOS document EOS BOS document EOS ..."""
    coded = tokenizer.backend_tokenizer.encode_batch(documents)
    return torch.cat([torch.tensor([*c.ids, EOS]) for c in coded])


@dataclass
class Text:
    """Token streams int64 [N], the starts of lines in the training stream int64 [M], and the held-out byte count."""

    train: Tensor
    held: Tensor
    line_starts: Tensor
    held_bytes: int
    sha256: str

    def rows(self, batch: int, seq_len: int, generator: torch.Generator) -> Tensor:
        """Training rows int64 [batch, seq_len]: BOS, then the text from the start of a random line."""
        usable = self.line_starts[self.line_starts < len(self.train) - seq_len]
        at = usable[torch.randint(len(usable), (batch, 1), generator=generator)]
        body = self.train[at + torch.arange(seq_len - 1)]
        return torch.cat([torch.full((batch, 1), BOS), body], dim=1)

    def held_rows(self, seq_len: int) -> Tensor:
        """Held-out rows int64 [B, seq_len]: BOS, then consecutive windows that do not overlap."""
        body = self.held[: len(self.held) // (seq_len - 1) * (seq_len - 1)].view(-1, seq_len - 1)
        return torch.cat([torch.full((len(body), 1), BOS), body], dim=1)


def load_text(work: Path) -> tuple[Text, PreTrainedTokenizerFast]:
    """The encoded text and its tokenizer (trained once, then kept in work/)."""
    train, held, sha256 = read_documents()
    path = work / "tokenizer"
    if not path.exists():
        train_tokenizer(train).save_pretrained(path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    stream = encode(tokenizer, train)
    ends_line = torch.tensor(["Ċ" in tokenizer.convert_ids_to_tokens(i) for i in range(VOCAB)])
    starts = ends_line[stream].nonzero().squeeze(1) + 1
    held_bytes = sum(len(text.encode()) for text in held)
    return Text(stream, encode(tokenizer, held), starts, held_bytes, sha256), tokenizer


# ------------------------------------------------------------------------------------------------------- batches ----


def _between(bounds: tuple[int, int], generator: torch.Generator) -> int:
    return int(torch.randint(bounds[0], bounds[1] + 1, (1,), generator=generator))


def _token_range(phase: Phase, generator: torch.Generator) -> tuple[int, int]:
    return 3, 3 + phase.symbols[_between((0, len(phase.symbols) - 1), generator)]


def _groups(rows: int) -> list[int]:
    """Split rows into groups of at most two: each group draws its own layout."""
    return [min(2, rows - i) for i in range(0, rows, 2)]


def make_repeats(phase: Phase, rows: int, text: Text, generator: torch.Generator) -> RecallBatch:
    """One group of repeated segments: touching copies, or a gap of random symbols or of text."""
    gap = torch.rand(2, generator=generator).tolist()
    gapped = gap[0] < phase.gap_share
    return repeated_segments(
        rows,
        phase.seq_len,
        token_range=_token_range(phase, generator),
        segment=phase.segment,
        gap=(0, phase.seq_len) if gapped else (0, 0),
        alphabet=phase.alphabet,
        bos_token_id=BOS,
        filler=text.rows(rows, phase.seq_len, generator)[:, 1:] if gapped and gap[1] < 0.5 else None,
        generator=generator,
    )


def make_pairs(phase: Phase, rows: int, text: Text, generator: torch.Generator) -> RecallBatch:
    """One group of key-value rows: several rounds without filler, or one round behind random filler or text."""
    gap = torch.rand(2, generator=generator).tolist()
    gapped = gap[0] < phase.gap_share
    pairs = _between(phase.pairs, generator)
    rounds = (phase.seq_len - 1) // (2 * pairs) - 1
    return key_value_pairs(
        rows,
        phase.seq_len,
        token_range=_token_range(phase, generator),
        n_pairs=pairs,
        rounds=1 if gapped else rounds,
        bos_token_id=BOS,
        filler=text.rows(rows, phase.seq_len, generator)[:, 1:] if gapped and gap[1] < 0.5 else None,
        generator=generator,
    )


def make_batch(phase: Phase, text: Text, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(ids int64 [B, T], loss weight float32 [B, T - 1] of predicting ids[:, 1:])."""
    n_text, n_repeat, n_pairs = phase.shares
    parts = [make_repeats(phase, n, text, generator) for n in _groups(n_repeat)]
    parts += [make_pairs(phase, n, text, generator) for n in _groups(n_pairs)]
    recall = cat_batches(parts)
    weight = torch.where(recall.mask[:, :-1], 1.0, UNPREDICTABLE_WEIGHT)
    weight[:, :OPENING] = 1.0
    ids = torch.cat([text.rows(n_text, phase.seq_len, generator), recall.input_ids])
    return ids, torch.cat([torch.ones(n_text, phase.seq_len - 1), weight])


# ------------------------------------------------------------------------------------------------------ training ----


def learning_rate(phase: Phase, step: int) -> float:
    """Linear warm-up over WARMUP steps, then cosine from phase.lr to phase.lr_end."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / (phase.planned or phase.steps)))
    return min(1.0, (step + 1) / WARMUP) * (phase.lr_end + (phase.lr - phase.lr_end) * cosine)


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.AdamW, ids: Tensor, weight: Tensor) -> Tensor:
    """One update; returns the per-token loss, float32 [B, T - 1]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=AUTOCAST):
        logits = model(ids, use_cache=False).logits.float()
    target = F.pad(ids[:, 1:], (0, 1), value=-100)  # the ignored last column is cheaper than slicing the logits
    loss = F.cross_entropy(logits.view(-1, VOCAB), target.view(-1), reduction="none").view_as(ids)[:, :-1]
    (loss * weight).sum().div(weight.sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


@dataclass
class State:
    """Everything a resumed run needs."""

    model: LlamaForCausalLM
    optimizer: torch.optim.AdamW
    generator: torch.Generator
    phase: int = 0
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically."""
        blob = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "counters": (self.phase, self.step, self.tokens, self.seconds),
        }
        torch.save(blob, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of save()."""
        blob = torch.load(path, weights_only=True)
        self.model.load_state_dict(blob["model"])
        self.optimizer.load_state_dict(blob["optimizer"])
        self.generator.set_state(blob["generator"])
        self.phase, self.step, self.tokens, self.seconds = blob["counters"]


def _orthonormal(columns: int, direction: Tensor) -> Tensor:
    """Random orthonormal columns at a right angle to the unit vector `direction` [H]: float32 [H, columns]."""
    random = torch.randn(len(direction), columns)
    return torch.linalg.qr(random - torch.outer(direction, direction @ random)).Q


def _seed_previous_token(layer: torch.nn.Module, constant: Tensor, write: Tensor) -> None:
    """Make query heads 0, 1, 2 of a layer look 1, 2, 3 tokens back and write what they find to columns of `write`.

    constant: [H], a direction that every token's embedding has in common; write: [H, 3 * D]. RoPE turns pair j (dims j
    and j + D / 2) by position * angle[j], so key 1 and query exp(-i m angle) score sum_j cos((distance - m) angle[j]).
    """
    d, fast = MODEL["head_dim"], 8
    angle = MODEL["rope_theta"] ** (-2 * torch.arange(fast) / d)
    attn = layer.self_attn
    attn.k_proj.weight[:d].mul_(0.1)
    attn.k_proj.weight[:fast] = constant
    attn.v_proj.weight[:d] -= torch.outer(attn.v_proj.weight[:d] @ constant, constant)
    for head in range(3):
        at = head * d
        attn.q_proj.weight[at : at + d].mul_(0.1)
        attn.q_proj.weight[at : at + fast] = torch.outer(((head + 1) * angle).cos(), constant)
        attn.q_proj.weight[at + d // 2 : at + d // 2 + fast] = -torch.outer(((head + 1) * angle).sin(), constant)
        attn.o_proj.weight[:, at : at + d] = write[:, at : at + d] * (0.25 if head == 0 else 0.15)


def _seed_match_and_copy(layer: torch.nn.Module, constant: Tensor, read: Tensor, project: Tensor) -> None:
    """Make two query heads per key-value head find "the token before was the one I see" and copy what stands there.

    read: [H, D], where the layer below writes the previous token; project: [D, H], how it wrote it. Only the slow RoPE
    pairs are used, because the match has to survive distance.
    """
    d, strength, half = MODEL["head_dim"], 2.2, MODEL["head_dim"] // 2
    slow = torch.cat([torch.arange(10, half), torch.arange(10, half) + half])
    basis = torch.linalg.qr(torch.randn(d, d)).Q
    group = MODEL["num_attention_heads"] // MODEL["num_key_value_heads"]
    copy = _orthonormal(d * MODEL["num_key_value_heads"], constant)
    attn = layer.self_attn
    for kv in range(MODEL["num_key_value_heads"]):
        part = basis[kv * len(slow) : (kv + 1) * len(slow)]
        attn.k_proj.weight[kv * d : (kv + 1) * d].mul_(0.1)
        attn.k_proj.weight[kv * d + slow] = strength * part @ read.T
        attn.v_proj.weight[kv * d : (kv + 1) * d] = copy[:, kv * d : (kv + 1) * d].T
        for head in (kv * group, kv * group + 1):
            attn.q_proj.weight[head * d : (head + 1) * d].mul_(0.1)
            attn.q_proj.weight[head * d + slow] = strength * part @ project
            attn.o_proj.weight[:, head * d : (head + 1) * d] = 0.5 * copy[:, kv * d : (kv + 1) * d]


@torch.no_grad()
def seed_induction(model: LlamaForCausalLM) -> None:
    """Start from a rough induction circuit in layers 0 and 1, so that recall need not wait for chance to build it.

    From a plain start the circuit needs more than 1,500 steps over the whole vocabulary, most of a CPU budget. All
    weights stay trainable; training sharpens the circuit and stretches it to long distances.
    """
    for layer in model.model.layers:  # what is added to the residual stream starts small
        layer.self_attn.o_proj.weight.mul_(0.1)
        layer.mlp.down_proj.weight.mul_(0.03)
    hidden, d = MODEL["hidden_size"], MODEL["head_dim"]
    constant = torch.full((hidden,), hidden**-0.5)
    embedding = model.model.embed_tokens.weight
    embedding += 0.6 * constant - torch.outer(embedding @ constant, constant)
    write = _orthonormal(3 * d, constant)
    _seed_previous_token(model.model.layers[0], constant, write)
    project = model.model.layers[0].self_attn.v_proj.weight[:d]
    _seed_match_and_copy(model.model.layers[1], constant, write[:, :d], project)


def fresh_state() -> State:
    """A seeded model, optimizer and data generator."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    seed_induction(model)
    return State(model, make_optimizer(model), torch.Generator().manual_seed(SEED))


def run_phase(state: State, phase: Phase, text: Text, checkpoint: Path, console: Console) -> None:
    """Train one phase from state.step on, with a checkpoint every 100 steps."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    state.model.train()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(phase.name, total=phase.steps, completed=state.step)
        while state.step < phase.steps:
            began = time.monotonic()
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(phase, state.step)
            ids, weight = make_batch(phase, text, state.generator)
            loss = train_step(state.model, state.optimizer, ids, weight)
            state.step += 1
            state.tokens += ids.numel()
            state.seconds += time.monotonic() - began
            progress.update(task, completed=state.step)
            if state.step % 25 == 0 or state.step == phase.steps:
                known = loss[phase.shares[0] :][weight[phase.shares[0] :] == 1.0].mean()
                progress.console.print(
                    f"{phase.name} {state.step}/{phase.steps} text {loss[: phase.shares[0]].mean():.3f} recall "
                    f"{known:.3f} {state.tokens / 1e6:.2f}M tokens {state.seconds / 60:.1f} min"
                )
            if state.step % 100 == 0:
                state.save(checkpoint)
    state.phase, state.step = state.phase + 1, 0
    state.save(checkpoint)


# ------------------------------------------------------------------------------------------------------- figures ----


def text_figures(model: LlamaForCausalLM, text: Text, seq_len: int, max_rows: int) -> dict[str, float]:
    """Held-out loss (nats per token) of the model and of a unigram model, and bits per byte of both."""
    rows = text.held_rows(seq_len)
    counts = torch.bincount(text.train, minlength=VOCAB).double() + 1
    unigram = -(counts / counts.sum()).log()[rows[:, 1:]].mean().item()
    total, n = 0.0, 0
    with torch.no_grad():
        for part in rows[:max_rows].split(8):
            logits = model(part, use_cache=False).logits[:, :-1].reshape(-1, VOCAB)
            total += F.cross_entropy(logits, part[:, 1:].reshape(-1), reduction="sum").item()
            n += part[:, 1:].numel()
    bits = len(text.held) / text.held_bytes / math.log(2)
    return {
        "held_out_loss": total / n,
        "unigram_loss": unigram,
        "bits_per_byte": total / n * bits,
        "unigram_bits_per_byte": unigram * bits,
        "context": seq_len,
        "held_out_tokens_scored": n,
    }


def recall_sets(seq_len: int, rows: int, text: Text) -> dict[str, RecallBatch]:
    """Fixed recall tests over the whole alphabet at one context length; text filler comes from the held-out files."""
    generator = torch.Generator().manual_seed(SEED + seq_len)
    common: dict[str, Any] = {"token_range": (3, VOCAB), "bos_token_id": BOS, "generator": generator}
    filler = text.held_rows(seq_len)[:rows, 1:]
    rows = min(rows, len(filler))
    pairs = seq_len // 16
    segment = (seq_len // 32, (seq_len - 2) // 2)
    gapped = {**common, "segment": (16, 64), "gap": (0, seq_len)}
    return {
        "repeated_segments": repeated_segments(rows, seq_len, segment=segment, **common),
        "repeated_segments_random_gap": repeated_segments(rows, seq_len, **gapped),
        "repeated_segments_text_gap": repeated_segments(rows, seq_len, filler=filler, **gapped),
        "key_value": key_value_pairs(rows, seq_len, n_pairs=pairs, rounds=6, **common),
        "key_value_random_filler": key_value_pairs(rows, seq_len, n_pairs=pairs, **common),
        "key_value_text_filler": key_value_pairs(rows, seq_len, n_pairs=pairs, filler=filler, **common),
    }


def recall_figures(model: LlamaForCausalLM, text: Text, quick: bool) -> dict[str, Any]:
    """{"context 512": {kind: {distance bucket: {accuracy, count}}}, ...}"""

    def logits_fn(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits

    figures: dict[str, Any] = {}
    for seq_len, rows in [(512, 8)] if quick else [(512, 64), (1024, 32), (2048, 16)]:
        sets = recall_sets(seq_len, rows, text)
        figures[f"context {seq_len}"] = {k: recall_accuracy(logits_fn, b, rows_per_call=4) for k, b in sets.items()}
    return figures


def rounded(value: Any) -> Any:
    """The same structure with floats cut to four decimals."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def collect_figures(state: State, phases: list[Phase], text: Text, quick: bool) -> dict[str, Any]:
    """Everything that goes into training_figures.json."""
    state.model.eval()
    done = phases[: state.phase]
    return {
        "finished": state.phase == len(phases) and not quick,
        "seed": SEED,
        "phases": [{**asdict(p), "tokens": p.steps * p.seq_len * sum(p.shares)} for p in done],
        "steps": sum(p.steps for p in done),
        "tokens_seen": state.tokens,
        "wall_minutes": state.seconds / 60,
        "threads": torch.get_num_threads(),
        "autocast": "bfloat16" if AUTOCAST else None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "data": {"sha256": text.sha256, "train_tokens": len(text.train), "held_out_tokens": len(text.held)},
        "text": text_figures(state.model, text, 512, 16 if quick else 10**9),
        "recall": recall_figures(state.model, text, quick),
    }


# ------------------------------------------------------------------------------------------------------ shipping ----

CARD = """---
license: apache-2.0
language: [en, code]
library_name: transformers
---

# linearize demo model

A Llama of {parameters:,} parameters (4 layers, hidden 192, 6 heads, 2 key-value heads, vocabulary 1,024, context
2,048) that ships inside `linearize`, so that a conversion can be tried and measured without a network. It predicts
Python source text and recalls from its context; it is no assistant and knows nothing else.

**Data.** The `.py` sources and the licence text of CPython {python}'s standard library (without tests, idlelib,
encodings and generated tables; about 3 % of the files, by a hash of the name, held out), and synthetic recall
sequences: random segments that repeat, and key-value pairs that are asked for later. Every sequence starts with
`<|bos|>`, so samples from `<|bos|>` alone at temperature 1 contain text and recall sequences alike.

**Licence.** The text is under the PSF licence of Python; the weights and the tokenizer are under Apache-2.0.

## Figures{unfinished}

{steps:,} steps, {tokens_seen:,} tokens, {wall_minutes:.1f} minutes on {threads} shared CPU threads, seed {seed}. Exact
values and versions are in `training_figures.json`. Training starts from a rough induction circuit placed in the
random weights of layers 0 and 1 (`seed_induction` in the script; about 9 % recall at distance 64 before the first
step), because chance alone needs far longer to build one; every weight is then trained.

| held-out text, context 512 | model | unigram |
|---|---|---|
| nats per token | {held_out_loss:.3f} | {unigram_loss:.3f} |
| bits per byte | {bits_per_byte:.3f} | {unigram_bits_per_byte:.3f} |

Recall, top-1 accuracy by the distance to look back (tokens):

{recall_table}

The alphabet of the recall tests is the whole vocabulary without the special tokens; symbols of repeated segments are
drawn with replacement.

## Reproduce

`python tools/train_demo_model.py --work build/demo_model` with the versions in `training_figures.json`; the phases are
the table at the top of that script. Another Python patch release, thread count or CPU gives slightly other weights.
"""


def recall_table(recall: dict[str, Any]) -> str:
    """A markdown table: one row per context and kind, one column per distance bucket."""
    kinds = [(context, kind, row) for context, table in recall.items() for kind, row in table.items()]
    seen = {bucket for _, _, row in kinds for bucket in row if bucket != "all"}
    buckets = [*sorted(seen, key=lambda b: int(b.split("-")[0].rstrip("+"))), "all"]
    lines = ["| context | kind | " + " | ".join(buckets) + " |", "|---" * (len(buckets) + 2) + "|"]
    for context, kind, row in kinds:
        cells = [f"{row[b]['accuracy']:.3f}" if b in row else "" for b in buckets]
        lines.append(f"| {context.split()[1]} | {kind.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_card(figures: dict[str, Any]) -> str:
    """README.md of the shipped directory."""
    flat = {**figures, **figures["text"], "python": figures["versions"]["python"]}
    unfinished = "" if figures["finished"] else " (of an unfinished run)"
    return CARD.format(**flat, unfinished=unfinished, recall_table=recall_table(figures["recall"]))


def directory_bytes(path: Path) -> int:
    """Sum of the file sizes in one flat directory."""
    return sum(p.stat().st_size for p in path.iterdir())


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    """Write training_figures.json with total_bytes counting that file itself."""
    target = path / "training_figures.json"
    figures["total_bytes"] = 0
    for _ in range(3):  # the number's own digits change the size: the second pass settles it
        target.write_text(json.dumps(rounded(figures), indent=1) + "\n", encoding="utf-8")
        figures["total_bytes"] = directory_bytes(path)


def ship(state: State, tokenizer: PreTrainedTokenizerFast, figures: dict[str, Any], out: Path) -> int:
    """Write the directory beside `out`, then move its files in one by one; returns the total bytes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".demo_model_") as name:
        part = Path(name)
        state.model.save_pretrained(part)
        GenerationConfig(
            bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=True, temperature=1.0, top_k=0
        ).save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "README.md").write_text(write_card(figures), encoding="utf-8")
        write_figures(part, figures)
        total = directory_bytes(part)
        if total > SIZE_LIMIT:
            raise RuntimeError(f"{total} bytes exceed the limit of {SIZE_LIMIT}")
        out.mkdir(exist_ok=True)
        for file in sorted(part.iterdir()):
            os.chmod(file, 0o644)
            os.replace(file, out / file.name)
    return total


def quick_phases() -> list[Phase]:
    """Three steps of every phase."""
    return [replace(p, steps=3) for p in PHASES]


def main(argv: list[str] | None = None) -> int:
    """Train (or resume), shipping after every phase."""
    parser = argparse.ArgumentParser(description="Train the demo model of linearize.")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "demo_model", help="checkpoint and tokenizer")
    parser.add_argument("--out", type=Path, default=ROOT / "linearize" / "demo_model", help="directory to ship")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--restart", action="store_true", help="forget the checkpoint in --work")
    parser.add_argument("--quick", action="store_true", help="a few steps of each phase, for a smoke test")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.restart and args.work.exists():
        shutil.rmtree(args.work)
    args.work.mkdir(parents=True, exist_ok=True)
    console = Console()
    text, tokenizer = load_text(args.work)
    console.print(
        f"{len(text.train):,} training tokens, {len(text.held):,} held out, {text.held_bytes:,} bytes held out"
    )
    phases = quick_phases() if args.quick else PHASES
    state, checkpoint = fresh_state(), args.work / "checkpoint.pt"
    if checkpoint.exists():
        state.load(checkpoint)
    while state.phase < len(phases):
        run_phase(state, phases[state.phase], text, checkpoint, console)
        last = state.phase == len(phases)
        figures = collect_figures(state, phases, text, quick=args.quick or not last)
        figures["finished"] = last and not args.quick
        total = ship(state, tokenizer, figures, args.out)
        console.print(rounded({"text": figures["text"], "recall": figures["recall"], "total_bytes": total}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
