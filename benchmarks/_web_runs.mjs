// node _web_runs.mjs NODE_FOLDER ROUNDS FOLDER COUNT: microseconds of CPU a run of FOLDER/0.onnx, 1.onnx, .. in
// onnxruntime-web (WebAssembly, one thread), the least over rounds in which all take turns, as a JSON list.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";

const [node, rounds, folder, count] = process.argv.slice(2);
const ort = createRequire(join(node, "package.json"))("onnxruntime-web");
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";

const models = [];
for (let place = 0; place < Number(count); place++) {
  const session = await ort.InferenceSession.create(readFileSync(join(folder, `${place}.onnx`)));
  const [input] = session.inputMetadata;
  const size = input.shape.reduce((product, dim) => product * dim, 1);
  const data = Float32Array.from({ length: size }, (_, i) => Math.sin(12.9898 * i));
  models.push({ session, feeds: { [input.name]: new ort.Tensor("float32", data, input.shape) }, best: Infinity });
}
for (let round = -2; round < Number(rounds); round++)
  for (const model of models) {
    if (round === 0) model.best = Infinity; // what came before was not compiled to the end
    const repeats = Math.max(2, Math.min(200, Math.round(40_000 / Math.min(model.best, 4_000))));
    const started = process.cpuUsage();
    for (let i = 0; i < repeats; i++) await model.session.run(model.feeds);
    const { user, system } = process.cpuUsage(started);
    model.best = Math.min(model.best, (user + system) / repeats);
  }
console.log(JSON.stringify(models.map((model) => model.best)));
