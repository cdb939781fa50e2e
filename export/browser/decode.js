import { overWhite } from "./resample.js";

// An 8-bit PNG gives the values that Pillow gives. A JPEG need not: decoders differ in their inverse transform and in how they scale
// colour up. Files of 16 bits and CMYK are rounded otherwise, and a browser may show half of a truncated file that Pillow refuses.

/** A file or blob to {width, height, data}: upright RGB, three bytes a pixel, transparency laid over white, no colour profile applied. */
export async function decode(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", imageOrientation: "from-image", premultiplyAlpha: "none" });
  try {
    const { width, height } = bitmap;
    const drawn = onCanvas(bitmap);
    const opaque = new Uint32Array(drawn.buffer).every((pixel) => pixel >= 0xff000000);
    return { width, height, data: overWhite(opaque ? drawn : (throughTexture(bitmap) ?? drawn)) };
  } finally {
    bitmap.close();
  }
}

function onCanvas(bitmap) {
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}

let gl;

/** RGBA by way of the GPU, or null where there is none: a canvas keeps colours multiplied by alpha, which loses their low bits. */
function throughTexture(bitmap) {
  gl ??= new OffscreenCanvas(1, 1).getContext("webgl2");
  if (!gl || Math.max(bitmap.width, bitmap.height) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) return null;
  const texture = gl.createTexture();
  const frame = gl.createFramebuffer();
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, frame);
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  const rgba = new Uint8Array(bitmap.width * bitmap.height * 4);
  gl.readPixels(0, 0, bitmap.width, bitmap.height, gl.RGBA, gl.UNSIGNED_BYTE, rgba);
  const failed = gl.getError() !== gl.NO_ERROR;
  gl.deleteFramebuffer(frame);
  gl.deleteTexture(texture);
  return failed ? null : rgba;
}
