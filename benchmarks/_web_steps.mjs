// node _web_steps.mjs NODE_FOLDER ROUNDS DIR DIR ..: CPU milliseconds of a step of 1, 8 and 128 tokens of exported
// directories in onnxruntime-web (WebAssembly, one thread), after a prompt of 128: the least over rounds in which all
// take turns, as a JSON list of {"1": .., "8": .., "128": ..}.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [node, rounds, ...directories] = process.argv.slice(2);
const ort = createRequire(join(node, "package.json"))("onnxruntime-web");
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";
const TYPES = { float32: Float32Array, int64: BigInt64Array, bool: Uint8Array };
const LENGTHS = { 1: 20, 8: 5, 128: 1 };
const PROMPT = 128;

const tokens = (length) => Array.from({ length }, (_, i) => 5 + ((37 * i) % 400));
const integers = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);

function empty(entry) {
  const dims = entry.shape.map((dim) => (dim === "batch" ? 1 : dim));
  return new ort.Tensor(entry.dtype, new TYPES[entry.dtype](dims.reduce((a, b) => a * b, 1)), dims);
}

async function open(directory) {
  const manifest = JSON.parse(readFileSync(join(directory, "linearize.json"), "utf8"));
  const data = new Uint8Array(readFileSync(join(directory, manifest.weights.file)));
  const externalData = [{ path: manifest.weights.file, data }];
  const session = await ort.InferenceSession.create(readFileSync(join(directory, manifest.graph)), { externalData });
  let state = Object.fromEntries(manifest.states.map((entry) => [entry.in, empty(entry)]));
  let seen = 0;
  const step = async (length) => {
    const ids = tokens(length);
    const feeds = { input_ids: integers(ids), attention_mask: integers(ids.map(() => 1)), ...state };
    if (manifest.inputs.some((input) => input.name === "position_ids"))
      feeds.position_ids = integers(ids.map((_, i) => seen + i));
    const results = await session.run(feeds);
    return Object.fromEntries(manifest.states.map((entry) => [entry.in, results[entry.out]]));
  };
  [state, seen] = [await step(PROMPT), PROMPT];
  return { step, best: {} };
}

const models = [];
for (const directory of directories) models.push(await open(directory));
for (let round = -1; round < Number(rounds); round++)
  for (const { step, best } of models)
    for (const [length, repeats] of Object.entries(LENGTHS)) {
      const started = process.cpuUsage();
      for (let i = 0; i < repeats; i++) await step(Number(length));
      const { user, system } = process.cpuUsage(started);
      const took = (user + system) / 1000 / repeats;
      if (round >= 0) best[length] = Math.min(best[length] ?? Infinity, took);
    }
console.log(JSON.stringify(models.map(({ best }) => best)));
