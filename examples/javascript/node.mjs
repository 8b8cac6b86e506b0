// node node.mjs DIR COUNT TOKEN TOKEN ...: continue a prompt of token ids, one id a line.
// Needs onnxruntime-node (npm install onnxruntime-node); NODE_PATH or a package.json here says where it is.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { generate } from "./linearize.mjs";

const [directory, count, ...prompt] = process.argv.slice(2);
if (!prompt.length) {
  console.error("usage: node node.mjs DIR COUNT TOKEN TOKEN ...");
  process.exit(2);
}
const ort = createRequire(import.meta.url)("onnxruntime-node");
const manifest = JSON.parse(readFileSync(join(directory, "linearize.json"), "utf8"));
const session = await ort.InferenceSession.create(join(directory, manifest.graph), { intraOpNumThreads: 1 });
await generate(ort, session, manifest, prompt.map(Number), Number(count), (id) => console.log(id));
