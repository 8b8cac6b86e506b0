// node browser.mjs WORK DIR COUNT TOKEN ...: the page index.html in headless Chromium, one id a line.
// WORK holds node_modules with playwright-core and onnxruntime-web. Serves page, model and runtime from 127.0.0.1.

import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";

const [work, directory, count, ...prompt] = process.argv.slice(2);
const here = dirname(fileURLToPath(import.meta.url));
const { chromium } = createRequire(join(work, "package.json"))("playwright-core");
const places = { model: directory, ort: join(work, "node_modules/onnxruntime-web/dist") };
const types = { ".html": "text/html", ".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json" };

const server = createServer(async (request, response) => {
  const path = normalize(decodeURIComponent(new URL(request.url, "http://x").pathname)).replace(/^\/+/, "");
  const [first, ...rest] = path.split("/");
  const file = places[first] ? join(places[first], ...rest) : join(here, path);
  try {
    const body = await readFile(file);
    response.writeHead(200, { "content-type": types[extname(file)] ?? "application/octet-stream" }).end(body);
  } catch {
    response.writeHead(404).end();
  }
});
await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
});
let failed = true;
try {
  const page = await browser.newPage();
  page.on("console", (message) => message.type() === "error" && console.error(message.text()));
  await page.goto(`http://127.0.0.1:${server.address().port}/index.html`);
  await page.fill("#prompt", prompt.join(" "));
  await page.fill("#count", count);
  await page.click("#run");
  await page.waitForFunction(() => document.body.dataset.done, null, { timeout: 240_000 });
  const text = await page.textContent("#output");
  failed = (await page.evaluate(() => document.body.dataset.done)) !== "yes";
  if (failed) console.error(text);
  else {
    console.log(text.trim().split(/\s+/).join("\n"));
    console.error(`seconds ${await page.evaluate(() => document.body.dataset.seconds)}`);
  }
} finally {
  await browser.close();
  server.close();
}
process.exit(failed ? 1 : 0);
