// Pictures to the exact pixels the network sees: what bingo_edge/image.py does through Pillow, bit for bit.
// Nothing here needs a browser; node runs it too.

// Weights are integers with 22 bits after the point, as in Pillow.
const BITS = 22;
const ONE = 1 << BITS;

// [support, weight]. Each is written term by term as Pillow orders it, so that the last bit of the weight is the same too.
const FILTERS = {
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, bicubic],
  lanczos: [3, (x) => (-3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
}

/** Whether `preprocess` can do all that a contract's `input.size` and `preprocess` ask. */
export function known({ size, crop_pct, interpolation, crop_mode = "center" }) {
  const sound = Number.isInteger(size) && size > 0 && crop_pct > 0 && crop_pct <= 1;
  return sound && ["center", "squash"].includes(crop_mode) && (interpolation === "nearest" || Object.hasOwn(FILTERS, interpolation));
}

/**
 * The network's input: the centred square of side crop_pct x the shorter side ("squash": the whole picture), resized with antialiasing.
 * picture: {width, height, data} with three bytes a pixel. Returns size x size x 3 bytes.
 */
export function preprocess(picture, { size, crop_pct, interpolation, crop_mode = "center" }) {
  const { width, height } = picture;
  const side = Math.min(width, height) * crop_pct;
  const [across, down] = crop_mode === "squash" ? [width, height] : [side, side];
  const narrow = resampled(picture, true, (width - across) / 2, (width + across) / 2, size, interpolation);
  return resampled(narrow, false, (height - down) / 2, (height + down) / 2, size, interpolation).data;
}

/** RGBA over white to RGB, rounded as Pillow's alpha_composite does. */
export function overWhite(rgba) {
  const rgb = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    const alpha = rgba[from + 3];
    for (let channel = 0; channel < 3; channel++) {
      const blend = rgba[from + channel] * alpha + 255 * (255 - alpha) + 128;
      rgb[to++] = (blend * 128 + (blend >> 1)) >> 15;
    }
  }
  return rgb;
}

/** One pass: every row (across) or column (down) from `start` to `end` becomes `size` pixels. */
function resampled({ width, height, data }, across, start, end, size, interpolation) {
  const [length, lines] = across ? [width, height] : [height, width];
  const out = { width: across ? size : width, height: across ? height : size };
  out.data = new Uint8Array(out.width * out.height * 3);
  const [inLine, inStep] = across ? [width * 3, 3] : [3, width * 3];
  const [outLine, outStep] = across ? [out.width * 3, 3] : [3, out.width * 3];

  // Pillow holds the box in single precision and takes the difference in it.
  const from = Math.fround(start);
  const scale = Math.fround(Math.fround(end) - from) / size;
  const taps = interpolation === "nearest" ? nearestTaps(length, from, scale, size) : filterTaps(length, from, scale, size, interpolation);
  for (let line = 0; line < lines; line++) {
    for (let place = 0; place < size; place++) {
      const { first, weights } = taps[place];
      for (let channel = 0; channel < 3; channel++) {
        let at = line * inLine + first * inStep + channel;
        let sum = ONE / 2;
        for (let tap = 0; tap < weights.length; tap++, at += inStep) sum += data[at] * weights[tap];
        out.data[line * outLine + place * outStep + channel] = Math.min(255, Math.max(0, sum >> BITS));
      }
    }
  }
  return out;
}

/** For each output pixel the first input pixel and the weights from there on; no weight at all gives black. */
function nearestTaps(length, from, scale, size) {
  let position = from + scale * 0.5;
  return Array.from({ length: size }, () => {
    const first = Math.trunc(position);
    position += scale; // added up, not multiplied: so does Pillow
    return { first, weights: first < length ? [ONE] : [] };
  });
}

function filterTaps(length, from, scale, size, interpolation) {
  const [support, weight] = FILTERS[interpolation];
  const stretch = Math.max(scale, 1);
  const reach = support * stretch;
  const shrink = 1 / stretch;
  return Array.from({ length: size }, (_, place) => {
    const centre = from + (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const last = Math.min(length, Math.trunc(centre + reach + 0.5));
    const exact = [];
    let total = 0;
    for (let index = first; index < last; index++) {
      exact.push(weight((index - centre + 0.5) * shrink));
      total += exact.at(-1);
    }
    const weights = Int32Array.from(exact, (one) => {
      const part = total === 0 ? one : one / total;
      return Math.trunc(part * ONE + (part < 0 ? -0.5 : 0.5));
    });
    return { first, weights };
  });
}
