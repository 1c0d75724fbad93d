// Shows /openapi.json: for each operation what goes in, a curl line for each example, and every answer.

import { element } from "./results.js";
import { fieldsOf, follow, typeOf, words } from "./shapes.js";

const METHODS = ["get", "post", "put", "patch", "delete"];
const find = (id) => document.getElementById(id);

/** Nodes of a text: paragraphs at empty lines, code between backticks. */
function prose(text, className = "") {
  return (text ?? "").trim().split(/\n\s*\n/).filter(Boolean)
    .map((paragraph) => element("p", className, ...words(paragraph)));
}

/** A block of code with a heading, and a button that copies it where the browser allows that. */
function block(title, code) {
  const caption = element("figcaption", "", title);
  if (navigator.clipboard) {
    const button = element("button", "", "Copy");
    button.type = "button";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(code);
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 2000);
    });
    caption.append(button);
  }
  const pre = element("pre", "", code);
  pre.tabIndex = 0; // long lines are scrolled with the keyboard too
  pre.setAttribute("aria-label", title);
  return element("figure", "", caption, pre);
}

const pretty = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));
const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

/** [name, value] of all examples of a media type: its own, else its schema's. */
function examplesOf(document, media) {
  if (media.examples) {
    return Object.entries(media.examples).map(([name, one]) => [one.summary ?? name, follow(document, one).value]);
  }
  if (media.example !== undefined) return [["", media.example]];
  const schema = follow(document, media.schema ?? {});
  const all = schema.examples ?? (schema.example === undefined ? [] : [schema.example]);
  return all.map((value) => [given(value), value]);
}

/** What tells one example from the next: the names of its fields. */
const given = (value) => (value && typeof value === "object" ? Object.keys(value).join(", ") : "");

/** What curl sends of an example: JSON, or the fields of a form. */
function payload(document, type, media, value) {
  if (type !== "multipart/form-data") return [`-H 'content-type: ${type}'`, `-d ${quoted(JSON.stringify(value))}`];
  const fields = follow(document, media.schema ?? {}).properties ?? {};
  const given = value ?? Object.fromEntries(Object.keys(fields).slice(0, 1).map((name) => [name, "image.jpg"]));
  const file = (name) => /binary|octet-stream/.test(JSON.stringify(fields[name] ?? {}));
  return Object.entries(given).map(([name, one]) => `-F ${quoted(`${name}=${file(name) ? "@" : ""}${one}`)}`);
}

/** The lines of curl for an operation, one for each example of its body. */
function commands(document, method, path, operation) {
  const guarded = (operation.security ?? document.security ?? []).some((one) => Object.keys(one).length);
  const key = guarded ? ['-H "Authorization: Bearer $TRIPTYCH_API_KEY"'] : [];
  const url = new URL(".", location.href).href + path.replace(/^\//, "");
  const line = (...rest) => ["curl", quoted(url), ...key, ...rest].join(" \\\n  ").replace("curl \\\n  ", "curl ");
  const content = Object.entries(operation.requestBody ? follow(document, operation.requestBody).content : {});
  if (!content.length) return [block("curl", line(...(method === "get" ? [] : [`-X ${method.toUpperCase()}`])))];
  return content.flatMap(([type, media]) => {
    const examples = examplesOf(document, media);
    return (examples.length || type !== "multipart/form-data" ? examples : [["", undefined]])
      .map(([name, value]) => block(name ? `curl: ${name}` : "curl", line(...payload(document, type, media, value))));
  });
}

function parameters(document, operation) {
  const all = (operation.parameters ?? []).map((one) => follow(document, one));
  if (!all.length) return [];
  const rows = all.map((one) => {
    const kind = `${typeOf(document, one.schema ?? {})}, ${one.in}`;
    const term = element("dt", "", element("b", "", one.name), element("span", "", kind));
    if (one.required) term.append(element("em", "", "required"));
    return element("div", "", term, ...(one.description ? [element("dd", "", ...words(one.description))] : []));
  });
  return [element("h3", "", "Parameters"), element("dl", "fields", ...rows)];
}

function request(document, operation) {
  if (!operation.requestBody) return [];
  return Object.entries(follow(document, operation.requestBody).content).flatMap(([type, media]) => [
    element("h3", "", "Request ", element("code", "", type)),
    ...prose(follow(document, media.schema ?? {}).description),
    ...fieldsOf(document, media.schema ?? {}),
  ]);
}

function replies(document, operation) {
  const all = Object.entries(operation.responses ?? {}).map(([status, given]) => {
    const response = follow(document, given);
    const code = element("b", status >= "400" ? "bad" : "", status);
    const line = [code, element("span", "", ...words(response.description ?? ""))];
    const inside = Object.entries(response.content ?? {}).flatMap(([type, media]) => [
      ...fieldsOf(document, media.schema ?? {}),
      ...examplesOf(document, media).map(([name, value]) => block(name || `Example, ${type}`, pretty(value))),
    ]);
    const headers = Object.entries(response.headers ?? {}).map(([name, one]) =>
      element("p", "", element("code", "", name), " ", ...words(follow(document, one).description ?? "")));
    if (!inside.length && !headers.length) return element("div", "row", ...line);
    return element("details", "", element("summary", "", ...line), element("div", "body", ...headers, ...inside));
  });
  return [element("h3", "", "Replies"), element("div", "replies", ...all)];
}

const badge = (method) => element("span", `method ${method}`, method.toUpperCase());

function section(document, method, path, operation) {
  const made = element("section", "operation", element("h2", "", badge(method), path));
  made.id = anchor(method, path);
  made.append(
    ...(operation.summary ? [element("p", "", operation.summary)] : []),
    ...prose(operation.description),
    ...parameters(document, operation),
    ...request(document, operation),
    element("h3", "", "Example"),
    ...commands(document, method, path, operation),
    ...replies(document, operation),
  );
  return made;
}

const anchor = (method, path) => `${method}-${path.replace(/[^a-z0-9]+/gi, "-").replace(/^-|-$/g, "")}`;

function showDocument(document) {
  find("title").textContent = `${document.info.title} API`;
  find("message").replaceWith(...prose(document.info.description, "lead"));
  const here = element("code", "", new URL(".", location.href).href);
  const address = element("dl", "facts", element("dt", "", "Address"), element("dd", "", here));
  for (const scheme of Object.values(document.components?.securitySchemes ?? {})) {
    const said = scheme.description ?? "`Authorization: Bearer KEY`";
    address.append(element("dt", "", "Key"), element("dd", "", ...words(said)));
  }
  find("api").append(address);
  for (const [path, operations] of Object.entries(document.paths)) {
    for (const method of METHODS.filter((one) => operations[one])) {
      find("api").append(section(document, method, path, operations[method]));
      const link = element("a", "", badge(method), element("span", "path", path));
      link.href = `#${anchor(method, path)}`;
      find("contents").append(element("li", "", link));
    }
  }
}

async function load() {
  try {
    const reply = await fetch("openapi.json");
    if (!reply.ok) throw new Error(`status ${reply.status}`);
    showDocument(await reply.json());
    if (location.hash) find(location.hash.slice(1))?.scrollIntoView();
  } catch (error) {
    find("message").textContent = `openapi.json cannot be shown: ${error.message}`;
    find("message").setAttribute("role", "alert");
  }
  find("api").removeAttribute("aria-busy");
}

load();
