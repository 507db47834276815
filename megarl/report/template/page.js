// What the parts of the page share: what it was given, its colours, unpacking, and what outlives a reload.
"use strict";
const given = JSON.parse(document.getElementById("given").textContent);
// At least 3 to 1 against the light and the dark background.
const PALETTE = ["#2f7ed8", "#d9600f", "#1f9254", "#c94a8a", "#8a63d2", "#a67c00", "#d64545", "#0e8f9c", "#7d7f86", "#9a6a3f"];
const DASHES = ["solid", "dashed", "dotted", "dotdash"];
const colour = (number) => PALETTE[number % PALETTE.length];
const dashOf = (run) => DASHES[run % DASHES.length];
const phases = [];
/** The colour of a phase, the same in every chart. */
function colourOf(phase) {
  if (!phases.includes(phase)) phases.push(phase);
  return colour(phases.indexOf(phase));
}

/** An element of `tag` with attributes and children; texts are text. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** A piece of a line, for a legend. */
function chipOf(shade, dash = "solid") {
  const chip = element("span", { className: "chip" });
  chip.style.borderTop = `4px ${dash === "dotdash" ? "double" : dash} ${shade}`;
  return chip;
}

/** What a script element holds as gzip in base64, as an object. */
async function unpack(id) {
  const text = document.getElementById(id).textContent;
  const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** What outlives a reload, where the browser lets a file keep something. */
const kept = {
  all: (() => { try { return JSON.parse(sessionStorage.getItem(location.pathname)) || {}; } catch { return {}; } })(),
  set(name, value) {
    this.all[name] = value;
    try { sessionStorage.setItem(location.pathname, JSON.stringify(this.all)); } catch { /* then it is forgotten */ }
  },
};

const themed = [];
function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  const button = document.getElementById("theme");
  button.setAttribute("aria-pressed", String(dark));
  button.textContent = dark ? "Light" : "Dark";
  for (const apply of themed) apply();
}
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
setTheme(kept.all.dark ?? prefersDark.matches);
prefersDark.addEventListener("change", () => { if (kept.all.dark === undefined) setTheme(prefersDark.matches); });
document.getElementById("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme !== "dark";
  kept.set("dark", dark);
  setTheme(dark);
});

const legend = document.getElementById("run-legend");
if (legend) given.runs.forEach((name, number) => {
  legend.append(chipOf(colour(number), dashOf(number)), `${name}  `);
});

if (given.reload !== null) {
  document.getElementById("live").hidden = false;
  const box = document.getElementById("reloads");
  box.checked = kept.all.reloads ?? true;
  box.addEventListener("change", () => kept.set("reloads", box.checked));
  setInterval(() => {
    if (!box.checked) return;
    kept.set("scroll", scrollY);
    location.reload();
  }, 1000 * given.reload);
}
