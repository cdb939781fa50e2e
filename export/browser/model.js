import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { decode } from "./decode.js";
import { known, preprocess } from "./resample.js";

ort.env.wasm.numThreads = 1; // more would need cross-origin isolation headers, which a plain file server does not send

export async function fetched(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`expected a file at ${url}, found status ${response.status}`);
  return response;
}

/** An open student network. `url` is student.onnx; student.json lies beside it. */
export async function openModel(url) {
  const [bytes, contract] = await Promise.all([
    fetched(url).then((response) => response.arrayBuffer()),
    fetched(url.replace(/\.onnx$/, ".json")).then((response) => response.json()),
  ]);
  const { input, preprocess: geometry, embedding_dim: dim, sha256 } = contract;
  const rule = { ...geometry, size: input.size };
  const kind = [contract.format, input.layout, input.dtype, input.color].join(" ");
  if (!["1 NHWC uint8 RGB", "1 NCHW float32 RGB"].includes(kind) || !known(rule)) {
    throw new Error(`expected a contract this page knows, found ${kind} ${JSON.stringify(rule)}`);
  }
  if (!("embedding" in (contract.outputs ?? { embedding: "" }))) {
    throw new Error("expected a file with an output embedding; export with --outputs embedding,features");
  }
  // Browsers hash only on https and localhost; a size can be told anywhere.
  const hashed = globalThis.crypto?.subtle ? await digest(bytes) : sha256;
  if (!sha256 || hashed !== sha256 || bytes.byteLength !== contract.bytes) {
    throw new Error(`student.json belongs to another file than ${url}`);
  }
  // Classes are in the file where it has a head; above the threshold a picture is of none of them.
  const classes = "scores" in (contract.outputs ?? {}) ? contract.classes : undefined;
  const threshold = "distance" in (contract.outputs ?? {}) ? contract.head?.threshold : undefined;
  const wanted = ["embedding", ...(classes ? ["scores"] : []), ...(threshold === undefined || threshold === null ? [] : ["distance"])];
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });

  /** size x size x 3 bytes to {embedding, answer}: a Float32Array of unit length and, of a file with classes, {label, probability, known}. */
  async function answerPixels(pixels) {
    // One at a time: a model may have its batch fixed at 1.
    const { embedding, scores, distance } = await session.run({ [input.name]: networkInput(input, pixels) }, wanted);
    if (embedding.data.length !== dim) throw new Error(`expected ${dim} values, found ${embedding.data.length}`);
    if (!scores) return { embedding: embedding.data };
    const best = scores.data.indexOf(Math.max(...scores.data));
    const known = !distance || distance.data[0] <= threshold;
    return { embedding: embedding.data, answer: { label: classes[best], probability: scores.data[best], known } };
  }

  /** size x size x 3 bytes to a Float32Array of unit length. */
  const embedPixels = async (pixels) => (await answerPixels(pixels)).embedding;

  /** A file or blob to {embedding, answer, prepare, network}, the last two in milliseconds: decode and resize, and the network. */
  async function embed(blob) {
    const start = performance.now();
    const pixels = preprocess(await decode(blob), rule);
    const ready = performance.now();
    const found = await answerPixels(pixels);
    return { ...found, prepare: ready - start, network: performance.now() - ready };
  }

  return { contract, rule, embed, embedPixels };
}

/** Bytes as they are, or floats by channels, less the contract's mean and by its std, which are on the scale of 0 to 255. */
function networkInput({ dtype, size, mean, std }, pixels) {
  if (dtype === "uint8") return new ort.Tensor("uint8", pixels, [1, size, size, 3]);
  const area = size * size;
  const floats = Float32Array.from({ length: 3 * area }, (_, place) => {
    const channel = Math.floor(place / area);
    return (pixels[3 * (place % area) + channel] - mean[channel]) / std[channel];
  });
  return new ort.Tensor("float32", floats, [1, 3, size, size]);
}

async function digest(bytes) {
  const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(hash, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
