// JSON schemas of an OpenAPI document as readable lists of fields.

import { element } from "./results.js";

/** What a `$ref` into the document stands for; anything else is itself. */
export function follow(document, node) {
  const seen = new Set();
  while (node?.$ref && !seen.has(node.$ref)) {
    seen.add(node.$ref);
    const rest = { ...node, $ref: undefined };
    node = node.$ref.replace(/^#\//, "").split("/")
      .reduce((at, key) => at?.[decodeURIComponent(key).replaceAll("~1", "/").replaceAll("~0", "~")], document) ?? {};
    if (rest.description) node = { ...node, description: rest.description };
  }
  return node ?? {};
}

const alternatives = (schema) => schema.anyOf ?? schema.oneOf?.filter((one) => !one.required || one.type) ?? [];
const constants = (values) => values.map((value) => JSON.stringify(value)).join(" | ");

/** A type in words: `string`, `array of SearchHit`, `"image" | "text"`, `string or null`. */
export function typeOf(document, schema) {
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.$ref) {
    const target = follow(document, schema);
    return target.enum ? constants(target.enum) : schema.$ref.split("/").pop();
  }
  if (schema.enum) return constants(schema.enum);
  const some = alternatives(schema);
  if (some.length) return [...new Set(some.map((one) => typeOf(document, one)))].join(" or ");
  if (schema.type === "array") return `array of ${typeOf(document, schema.items ?? {})}`;
  if (/binary/.test(schema.format ?? "") || schema.contentMediaType) return "file";
  return [schema.type ?? "any value"].flat().join(" or ");
}

const LIMITS = {
  minimum: "at least", maximum: "at most", exclusiveMinimum: "more than", exclusiveMaximum: "less than",
};
const SIZES = {
  minLength: ["at least", "character"], maxLength: ["at most", "character"],
  minItems: ["at least", "item"], maxItems: ["at most", "item"],
};

/** What a field allows and what it is without a value, in words. */
function limits(schema) {
  const has = ([name]) => schema[name] !== undefined;
  const said = Object.entries(LIMITS).filter(has).map(([name, words]) => `${words} ${schema[name]}`);
  for (const [name, [words, unit]] of Object.entries(SIZES).filter(has)) {
    said.push(`${words} ${schema[name]} ${unit}${schema[name] === 1 ? "" : "s"}`);
  }
  const { default: value } = schema;
  const telling = (value ?? "") !== "" && !Array.isArray(value);
  if (telling) said.push(`default ${JSON.stringify(value)}`);
  return said;
}

/** The object schemas that a value may contain, arrays and alternatives looked through; each with its name. */
function objectsIn(document, schema) {
  if (schema.$ref) {
    const target = follow(document, schema);
    if (target.properties) return [[schema.$ref.split("/").pop(), target]];
    return objectsIn(document, { ...target, $ref: undefined });
  }
  if (schema.properties) return [["", schema]];
  return [...alternatives(schema), ...(schema.items ? [schema.items] : [])].flatMap((one) => objectsIn(document, one));
}

/** Texts and code elements of a paragraph, code between backticks. */
export const words = (text) => text.split("`").map((part, index) => (index % 2 ? element("code", "", part) : part));

/**
 * Lists of the fields of the objects that a value may contain, with those of the objects in them inside.
 * `above` are the names that are open already: a schema may contain itself.
 */
export function fieldsOf(document, schema, above = []) {
  return objectsIn(document, schema).filter(([name]) => !name || !above.includes(name)).map(([name, object]) => {
    const rows = Object.entries(object.properties).map(([field, given]) => {
      const kind = [typeOf(document, given), ...limits(given)].join(", ");
      const term = element("dt", "", element("b", "", field), element("span", "", kind));
      if (object.required?.includes(field)) term.append(element("em", "", "required"));
      const row = element("div", "", term);
      if (given.description) row.append(element("dd", "", ...words(given.description)));
      row.append(...fieldsOf(document, given, [...above, name]).map((inner) => element("dd", "", inner)));
      return row;
    });
    return element("dl", "fields", ...rows);
  });
}
