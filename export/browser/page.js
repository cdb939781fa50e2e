import { cosine, selfCheck } from "./golden.js";
import { openModel } from "./model.js";

const SHOWN = 6;
const at = (id) => document.getElementById(id);
const url = new URLSearchParams(location.search).get("model") ?? "student.onnx";
const ms = (value) => `${value.toFixed(1)} ms`;
const floored = (cosine) => (Math.floor(cosine * 1e4) / 1e4).toFixed(4);
let model;
let index = [];
let query;

function figure(file, caption) {
  const made = at("picture").content.firstElementChild.cloneNode(true);
  made.querySelector("img").src = URL.createObjectURL(file);
  made.querySelector("img").onload = (event) => URL.revokeObjectURL(event.target.src);
  made.querySelector("figcaption").textContent = caption;
  return made;
}

async function fillIndex(files) {
  const found = [];
  const skipped = [];
  let network = 0;
  for (const file of files) {
    at("index-state").textContent = `${found.length} of ${files.length}`;
    try {
      const result = await model.embed(file);
      found.push({ file, embedding: result.embedding });
      network += result.network;
    } catch (error) {
      skipped.push(`${file.name} (${error.message})`);
    }
  }
  index = found;
  const left = skipped.length ? `; skipped ${skipped.join(", ")}` : "";
  at("index-state").textContent = `${found.length} pictures, ${ms(network / Math.max(found.length, 1))} each in the network${left}`;
  at("index-pictures").replaceChildren(...found.map(({ file }) => figure(file, file.name)));
}

async function ask(file) {
  const { embedding, answer, prepare, network } = await model.embed(file);
  query = { file, embedding };
  at("query-picture").replaceChildren(figure(file, file.name));
  at("query-answer").textContent = answer
    ? answer.known
      ? `${answer.label}, ${(100 * answer.probability).toFixed(0)}%`
      : `none of these (nearest: ${answer.label})`
    : "";
  at("query-state").textContent = `${ms(prepare)} to decode and resize, ${ms(network)} in the network`;
}

function showNearest() {
  if (!query || !index.length) return;
  const ranked = index.map(({ file, embedding }) => ({ file, near: cosine(embedding, query.embedding) }));
  ranked.sort((one, other) => other.near - one.near);
  at("nearest").replaceChildren(...ranked.slice(0, SHOWN).map(({ file, near }) => figure(file, `${near.toFixed(4)}  ${file.name}`)));
}

/** One thing at a time: the network does not run twice at once, and a picture chosen meanwhile waits. */
let busy = Promise.resolve();
function onFiles(id, act) {
  at(id).addEventListener("change", ({ target }) => {
    const files = [...target.files];
    const turn = busy.then(() => files.length && act(files)).then(showNearest);
    busy = turn.catch((error) => (at(`${id}-state`).textContent = error.message));
  });
}

async function start() {
  const began = performance.now();
  model = await openModel(url);
  const { student, embedding_dim } = model.contract;
  const opened = ms(performance.now() - began);
  at("model-state").textContent = `${student}, ${model.rule.size} px, ${embedding_dim} values; opened in ${opened}`;
  onFiles("index", fillIndex);
  onFiles("query", ([file]) => ask(file));
  const check = await selfCheck(model, url.replace(/\.onnx$/, ".golden"));
  at("check").dataset.passed = check?.passed ?? "";
  at("check").textContent = check
    ? `self-check ${check.passed ? "passed" : "FAILED"}: ${check.pictures} pictures, largest difference ${check.difference.toExponential(1)}; ` +
      `${check.samePixels} files decode to the very same pixels, the others to a cosine of ${floored(check.ownCosine)} at least`
    : "no self-check: no golden pictures beside the model";
  at("index").disabled = at("query").disabled = false;
}

start().catch((error) => (at("model-state").textContent = `error: ${error.message}`));
