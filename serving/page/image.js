// An image from the reader's device, made small enough to send. It goes to the service and nowhere else.

import { Failure } from "./api.js";

const SIDE = 512; // pixels; models read far fewer
const SMALL = 256 * 1024; // bytes; a file of at most so many, and of at most SIDE pixels, is sent as it is
const LARGEST = 12 * 1024 * 1024; // bytes of a file that this browser cannot open but the service perhaps can

/** {url: data URL, name} of a File. Throws Failure where it is no image. */
export async function readImage(file) {
  const name = file.name || "pasted image";
  if (file.type && !file.type.startsWith("image/")) throw new Failure(400, "This file is not an image.", name);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    if (file.size > LARGEST) throw new Failure(413, "This browser cannot open the image.", "It is too large to send as it is.");
    return { url: await dataUrl(file), name };
  }
  const scale = SIDE / Math.max(bitmap.width, bitmap.height);
  if (scale >= 1 && file.size <= SMALL) {
    bitmap.close();
    return { url: await dataUrl(file), name };
  }
  const url = drawn(bitmap, Math.min(1, scale));
  bitmap.close();
  return { url, name };
}

/** The bitmap as a JPEG data URL, transparency over white as the models see it. */
function drawn(bitmap, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.replace(/^data:[^;,]*/, `data:${blob.type || "image/jpeg"}`));
    reader.onerror = () => reject(new Failure(400, "This file cannot be read.", blob.name ?? ""));
    reader.readAsDataURL(blob);
  });
}
