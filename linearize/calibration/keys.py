"""Hashes by which measured and fitted things are found again: of a model, of token ids, of anything said in text."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from linearize.program import Program, program_text

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number
SAMPLES = 256  # numbers of a parameter that enter the model's hash, beside its sum


def hash_of(*texts: str) -> str:
    """32 hex digits."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32]


def tokens_key(batches: list[Tensor]) -> str:
    """A hash of token ids and of how they are batched."""
    return hash_of(*(f"{list(batch.shape)} {batch.cpu().numpy().tobytes().hex()}" for batch in batches))


def model_key(program: Program) -> str:
    """A hash of the graph and of every parameter: the sum of its numbers' bits as integers, which is the same in
    any order, and `SAMPLES` of its numbers. Of a model that stays on disk slices of its files count."""
    digest = hashlib.sha256(f"2 {program.model_name}\n{program_text(program)}".encode())
    if program.weights is not None:
        digest = hashlib.sha256(f"on disk {program.model_name}\n{program_text(program)}".encode())
        digest.update(program.weights.key().encode())
    own = [(name, parameter) for name, parameter in program.module.named_parameters() if not parameter.is_meta]
    for name, parameter in sorted(own):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLES)].double()
        total = flat.contiguous().view(WORDS[min(flat.element_size(), 8)]).sum(dtype=torch.int64).item()
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype} {total}".encode())
        digest.update(some.cpu().numpy().tobytes())
    return digest.hexdigest()
