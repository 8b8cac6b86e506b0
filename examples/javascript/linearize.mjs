// Greedy generation with an exported directory: one loop for node (onnxruntime-node) and the web (onnxruntime-web).
// `ort` is either package; `manifest` is the parsed linearize.json, which says everything that follows.

const TYPES = { float32: Float32Array, int64: BigInt64Array, bool: Uint8Array };

/** A tensor of zeros for a state entry: dims by name are the batch (1) and the tokens so far (0). */
function emptyState(ort, entry) {
  const dims = entry.shape.map((dim) => (dim === "batch" ? 1 : dim === "past" ? 0 : dim));
  const size = dims.reduce((product, dim) => product * dim, 1);
  return new ort.Tensor(entry.dtype, new TYPES[entry.dtype](size), dims);
}

const integers = (ort, values) =>
  new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

/** The index of the largest of the last token's logits. */
function mostLikely(logits) {
  const width = logits.dims[2];
  const start = logits.data.length - width;
  let best = 0;
  for (let i = 1; i < width; i++) if (logits.data[start + i] > logits.data[start + best]) best = i;
  return best;
}

/** `count` further tokens of one prompt. `onToken(id)` sees each. Stops early at an end token of the manifest. */
export async function generate(ort, session, manifest, prompt, count, onToken = () => {}) {
  let state = Object.fromEntries(manifest.states.map((entry) => [entry.in, emptyState(ort, entry)]));
  let seen = 0;
  const step = async (tokens) => {
    const feeds = { input_ids: integers(ort, tokens), attention_mask: integers(ort, tokens.map(() => 1)), ...state };
    if (manifest.inputs.some((input) => input.name === "position_ids"))
      feeds.position_ids = integers(ort, tokens.map((_, i) => seen + i));
    const results = await session.run(feeds);
    state = Object.fromEntries(manifest.states.map((entry) => [entry.in, results[entry.out]]));
    seen += tokens.length;
    return mostLikely(results.logits);
  };
  let next;
  for (let start = 0; start < prompt.length; start += manifest.prefill_piece)
    next = await step(prompt.slice(start, start + manifest.prefill_piece));
  const tokens = [];
  while (true) {
    tokens.push(next);
    onToken(next);
    if (tokens.length === count || manifest.eos_token_ids.includes(next)) return tokens;
    next = await step([next]);
  }
}
