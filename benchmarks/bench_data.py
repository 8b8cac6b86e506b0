"""What a fit is worth by what it was fitted on, and what making that costs a model that stays on disk.

    python benchmarks/bench_data.py      # the table of docs/calibration.md, about five minutes on one core

The embedded model, `lolcats` in closed form and one pass of gradients on 32,768 tokens in rows of 512, measured on
held-out text and recall as in `bench_calibration.py`. A token drawn reads all weights once, whatever the number of
rows, so that pieces of 64 tokens, each from its own beginning and joined to rows, read them 63 times instead of 511.
"""

from __future__ import annotations

import torch
from bench_calibration import LENGTH, SMALL, TOKENS, Bench
from torch import Tensor

from linearize.calibration.data import split_rows
from linearize.calibration.demo import text_rows
from linearize.calibration.samples import repeat_segments, sample_teacher
from linearize.progress import Progress

PIECES = (128, 64, 32)


class DataBench(Bench):
    def run(self) -> None:
        print("| fitted on | reads of all weights | MSE | perplexity | KL | recall 33-400 |", flush=True)
        print("|---|---:|---:|---:|---:|---:|", flush=True)
        self.tell("own samples", LENGTH - 1, self.samples)
        for size in PIECES:
            self.tell(f"own samples in pieces of {size}, joined", size - 1, self.joined(size))
        self.tell("text of the same kind", 0, self.same_kind())
        self.tell("random tokens", 0, self.random())

    def tell(self, name: str, reads: int, data: list[Tensor]) -> None:
        self.samples = data
        found = self.quality(*self.compiled(f"lolcats{{{SMALL}}}", passes=1, learning_rate=0.1))
        numbers = f"{found['mse']:.4f} | {found['perplexity']:.2f} | {found['kl']:.3f} | {100 * found['recall']:.1f}%"
        print(f"| {name} | {reads} | {numbers} |", flush=True)

    def joined(self, size: int) -> list[Tensor]:
        """Rows of pieces drawn on their own, every fourth row a segment again and again, as with whole samples."""
        pieces = torch.cat(sample_teacher(self.teacher, TOKENS, size, 0, Progress(False)))
        return self.rows_of(pieces.reshape(-1, LENGTH))

    def same_kind(self) -> list[Tensor]:
        """Of the standard library, on which the model was trained; nothing of it is in what is measured on."""
        import sysconfig
        from pathlib import Path

        from linearize.calibration import demo

        folder = Path(sysconfig.get_paths()["stdlib"])
        names = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
        known = [name for name in names if demo._wanted(name) and demo._bucket(name) >= demo.HOLD_OUT_PER_MILLE]
        texts = [(folder / name).read_text(encoding="utf-8", errors="replace") for name in known[::12]]
        return self.rows_of(text_rows(self.tokenizer, texts, TOKENS // LENGTH, LENGTH))

    def random(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return self.rows_of(torch.randint(3, len(self.tokenizer), (TOKENS // LENGTH, LENGTH), generator=generator))

    def rows_of(self, rows: Tensor) -> list[Tensor]:
        return split_rows([repeat_segments(rows, torch.Generator().manual_seed(1))], 4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    DataBench().run()
