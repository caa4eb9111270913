// Pictures: which files are some, how they are shown, how they are sent. They are sent as they are.

import { newId } from "./conversations.js";
import { icon, iconButton, make } from "./dom.js";

// What the server reads. Some systems have no type for HEIC: then the name says it.
const TYPES = ["png", "jpeg", "webp", "gif", "bmp", "tiff", "avif", "heic", "heif"];
const BY_NAME = {
  heic: "image/heic",
  heif: "image/heif",
  hif: "image/heif",
  tif: "image/tiff",
  tiff: "image/tiff",
  avif: "image/avif",
};
export const ACCEPT = [...TYPES.map((type) => `image/${type}`), ".heic", ".heif", ".hif"].join(",");

const urls = new WeakMap(); // blob → its address in this page

/** {id, name, blob} of a file, or null if it is no picture. */
export function pictureOf(file) {
  const type = file.type || BY_NAME[file.name.split(".").pop().toLowerCase()] || "";
  if (!TYPES.some((known) => type === `image/${known}`)) return null;
  return { id: newId(), name: file.name || "picture", blob: file.type ? file : new Blob([file], { type }) };
}

/** The content of a message: pictures first, then the words. */
export async function contentOf({ text, pictures }) {
  const items = await Promise.all(
    pictures.map(async ({ blob }) => ({ type: "image_url", image_url: { url: await dataUrl(blob) } })),
  );
  return items.length ? [...items, ...(text ? [{ type: "text", text }] : [])] : text;
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("A picture can no longer be read."));
    reader.readAsDataURL(blob);
  });
}

/** A picture as an element; a tile with its name where the browser cannot show it, as most cannot show HEIC. */
export function shown({ name, blob }) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  const image = make("img", { src: urls.get(blob), alt: name });
  image.addEventListener("error", () =>
    image.replaceWith(make("span", { class: "named" }, icon("picture"), make("span", { text: name }))),
  );
  return image;
}

/** A small preview with a button that takes it out. */
export function preview(picture, onremove) {
  return make(
    "li",
    { class: "preview" },
    shown(picture),
    iconButton("close", `Remove ${picture.name}`, onremove, { class: "quiet remove" }),
  );
}
