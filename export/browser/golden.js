import { decode } from "./decode.js";
import { fetched } from "./model.js";
import { preprocess } from "./resample.js";

/**
 * Whether this device computes what the exporting machine did, on the pictures in `folder` (student.golden/).
 *
 * Stored pixels decide, by the bounds of bingo-edge selftest. What this browser's own decoder makes of the files is told beside it.
 * Returns null without such a folder, else {passed, pictures, cosine, difference, samePixels, ownCosine}: the smallest cosine and the
 * largest difference of a value on stored pixels, how many files decode to those, and the smallest cosine on what was decoded.
 */
export async function selfCheck(model, folder) {
  const response = await fetch(`${folder}/golden.json`);
  if (!response.ok) return null;
  const { sha256, images } = await response.json();
  if (sha256 !== model.contract.sha256) throw new Error(`${folder} belongs to another model file`);
  const found = { pictures: images.length, cosine: 1, difference: 0, samePixels: 0, ownCosine: 1 };
  for (const { file, rgb, embedding } of images) {
    const stored = new Uint8Array(await (await fetched(`${folder}/${rgb}`)).arrayBuffer());
    const decoded = preprocess(await decode(await (await fetched(`${folder}/${file}`)).blob()), model.rule);
    const result = await model.embedPixels(stored);
    // Math.min and Math.max keep a NaN, and no comparison below holds for one.
    found.cosine = Math.min(found.cosine, cosine(result, embedding));
    found.difference = embedding.reduce((most, value, place) => Math.max(most, Math.abs(value - result[place])), found.difference);
    found.samePixels += decoded.every((value, place) => value === stored[place]);
    found.ownCosine = Math.min(found.ownCosine, cosine(await model.embedPixels(decoded), embedding));
  }
  // int8 kernels differ between processors; no value of two vectors of unit length differs by more than 2.
  const bounds = { float32: [0.9999, 1e-4], float16: [0.999, 0.02] };
  const [least, most] = bounds[model.contract.precision ?? "float32"] ?? [0.99, 2];
  const near = found.cosine >= least && found.difference <= most;
  return { passed: images.length > 0 && near, ...found };
}

/** Of two vectors of unit length. */
export function cosine(one, other) {
  return one.reduce((sum, value, place) => sum + value * other[place], 0);
}
