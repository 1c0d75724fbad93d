// What is asked, as the page's hash: text, row or image (by number only), and the controls.

export const FIRST = 24; // hits at first
export const MOST = 96; // and at most

/** The state that a hash stands for; what it does not say has its default. */
export function parse(hash) {
  const fields = new URLSearchParams(hash.replace(/^#/, ""));
  const count = Number(fields.get("k"));
  return {
    text: fields.get("q") ?? "",
    id: fields.get("id") ?? "",
    side: fields.get("side") === "text" ? "text" : "image",
    image: fields.get("image") ?? "",
    target: fields.get("target") === "text" ? "text" : "image",
    rerank: fields.get("rerank") === "1",
    count: Number.isInteger(count) && count > 0 ? Math.min(count, MOST) : FIRST,
    version: fields.get("version") ?? "",
  };
}

/** The hash of a state, or the page without one where nothing was changed. */
export function addressOf({ text, id, side, image, target, rerank, count, version }) {
  const fields = new URLSearchParams();
  if (text) fields.set("q", text);
  if (id) fields.set("id", id);
  if (id) fields.set("side", side);
  if (image) fields.set("image", image);
  if (target !== "image") fields.set("target", target);
  if (rerank) fields.set("rerank", "1");
  if (count !== FIRST) fields.set("k", count);
  if (version) fields.set("version", version);
  const asked = String(fields);
  return asked ? `#${asked}` : location.pathname + location.search;
}
