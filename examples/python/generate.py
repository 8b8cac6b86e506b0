"""Continue a prompt of token ids with an exported directory, one id a line; needs onnxruntime and numpy only.

    python generate.py DIR COUNT TOKEN TOKEN ...

States are bound to two sets of buffers that change places each step (IO binding), so that nothing is allocated or
copied while it generates.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


class Generator:
    """One sequence. The manifest says which output of a step is which input of the next."""

    def __init__(self, directory: Path) -> None:
        self.manifest = json.loads((directory / "linearize.json").read_text())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(directory / self.manifest["graph"]), options, providers=["CPUExecutionProvider"]
        )
        self.states = self.manifest["states"]
        if any(entry["grows"] is not None for entry in self.states):
            raise SystemExit("this model keeps a growing cache; fixed buffers cannot hold it")
        self.now, self.next = self._buffers(), self._buffers()
        self.seen = 0

    def _buffers(self) -> dict[str, onnxruntime.OrtValue]:
        shapes = {entry["in"]: [1 if dim == "batch" else dim for dim in entry["shape"]] for entry in self.states}
        return {
            entry["in"]: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shapes[entry["in"]], dtype=entry["dtype"]))
            for entry in self.states
        }

    def step(self, tokens: list[int]) -> int:
        """Feed tokens; the most likely next one."""
        ids = np.array([tokens], dtype=np.int64)
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(self.seen, self.seen + len(tokens))[None],
        }
        binding = self.session.io_binding()
        for entry in self.manifest["inputs"]:
            binding.bind_cpu_input(entry["name"], feeds[entry["name"]])
        for entry in self.states:
            binding.bind_ortvalue_input(entry["in"], self.now[entry["in"]])
            binding.bind_ortvalue_output(entry["out"], self.next[entry["in"]])
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        self.now, self.next = self.next, self.now
        self.seen += len(tokens)
        logits = binding.get_outputs()[-1].numpy()
        return int(logits[0, -1].argmax())


def main() -> None:
    directory, count, *prompt = sys.argv[1:]
    generator = Generator(Path(directory))
    piece, ids = generator.manifest["prefill_piece"], [int(token) for token in prompt]
    for start in range(0, len(ids), piece):
        token = generator.step(ids[start : start + piece])
    for left in range(int(count), 0, -1):
        print(token, flush=True)
        if left == 1 or token in generator.manifest["eos_token_ids"]:
            return
        token = generator.step([token])


if __name__ == "__main__":
    main()
