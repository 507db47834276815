// The browser of samples: filters, pages, and one sample with its tokens. Draws the rows of one page alone.
"use strict";
const PAGE = 25;
// The newest first.
const samples = { found: [], page: 0, open: null, sort: "step", down: true };

(async () => {
  const packed = await unpack("samples-packed");
  const at = Object.fromEntries(packed.columns.map((name, number) => [name, number]));
  const get = (row, name) => row[at[name]];
  const byId = (id) => document.getElementById(id);
  const form = byId("filters"), body = byId("rows").tBodies[0];

  const COLUMNS = [
    ...(given.runs.length > 1 ? [["run", "run", (row) => given.runs[get(row, "run")]]] : []),
    ["place", "from", (row) => packed.places[get(row, "place")]],
    ["step", "step", (row) => number(get(row, "step"))],
    ["prompt", "prompt", (row) => short(get(row, "prompt"))],
    ["answer", "reference", (row) => short(get(row, "answer"), 30)],
    ["text", "response", (row) => short(get(row, "text"))],
    ["reward", "reward", (row) => number(get(row, "reward"))],
    ["advantage", "advantage", (row) => signed(get(row, "advantage"))],
    ["length", "tokens", (row) => number(get(row, "length"))],
  ];

  // --- texts --------------------------------------------------------------------------------------------------------
  /** A text as it is shown: control characters and those that turn the writing's direction have signs of their own. */
  function visible(text) {
    return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]/gu, (one) => {
      const code = one.codePointAt(0);
      return code < 0x20 ? String.fromCodePoint(0x2400 + code) : code === 0x7f ? "\u2421" : `‹U+${code.toString(16).toUpperCase().padStart(4, "0")}›`;
    });
  }
  const short = (text, most = 80) => visible(text.slice(0, most).replace(/\s+/g, " ")) + (text.length > most ? "…" : "");
  const number = (value) => (value === null || value === undefined ? "–" : String(Math.round(value * 1e4) / 1e4));
  const signed = (value) => (value === null || value === undefined ? "–" : (value > 0 ? "+" : "") + number(value));

  // --- filters ------------------------------------------------------------------------------------------------------
  function options(name, values) {
    const select = form.elements[name];
    select.replaceChildren(element("option", { value: "" }, "all"), ...values.map(([value, text]) => element("option", { value }, text)));
    select.closest("label").hidden = values.length < 2;
  }
  const different = (name) => [...new Set(packed.rows.map((row) => get(row, name)))].filter((one) => one !== "").sort();
  options("run", given.runs.map((name, place) => [String(place), name]));
  options("place", packed.places.map((name, place) => [String(place), name]));
  options("source", different("source").map((name) => [name, visible(name)]));
  options("level", different("level").map((name) => [name, visible(name)]));

  function filter() {
    const values = Object.fromEntries(new FormData(form));
    const tests = [];
    const bound = (name, column, within) => {
      if (values[name] !== "") tests.push((row) => get(row, column) !== null && within(get(row, column), Number(values[name])));
    };
    for (const name of ["run", "place"]) if (values[name] !== "") tests.push((row) => get(row, name) === Number(values[name]));
    for (const name of ["source", "level"]) if (values[name] !== "") tests.push((row) => get(row, name) === values[name]);
    for (const column of ["step", "reward"]) {
      bound(`${column}_low`, column, (value, least) => value >= least);
      bound(`${column}_high`, column, (value, most) => value <= most);
    }
    if (values.text !== "") {
      const wanted = new RegExp(values.text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "iu");
      tests.push((row) => ["prompt", "answer", "text"].some((name) => wanted.test(get(row, name))));
    }
    samples.found = packed.rows.filter((row) => tests.every((test) => test(row)));
    sort();
    samples.page = 0;
    kept.set("filters", values);
    draw();
  }
  function sort() {
    const column = at[samples.sort], sign = samples.down ? -1 : 1;
    const missing = samples.down ? -Infinity : Infinity;
    const of = (row) => row[column] ?? missing;
    // What is alike stays in the order of the files; what has nothing comes last.
    samples.found.sort((a, b) => (of(a) < of(b) ? -sign : of(a) > of(b) ? sign : 0));
  }

  // --- the table ----------------------------------------------------------------------------------------------------
  const head = byId("rows").tHead.rows[0];
  for (const [name, title] of COLUMNS) {
    const button = element("button", { type: "button" }, title);
    button.addEventListener("click", () => {
      samples.down = samples.sort === name && !samples.down;
      samples.sort = name;
      sort();
      samples.page = 0;
      draw();
    });
    head.append(element("th", { scope: "col" }, button));
  }
  function draw() {
    const pages = Math.max(1, Math.ceil(samples.found.length / PAGE));
    samples.page = Math.min(Math.max(samples.page, 0), pages - 1);
    const first = samples.page * PAGE;
    COLUMNS.forEach(([name], place) => head.cells[place].setAttribute("aria-sort",
      name !== samples.sort ? "none" : samples.down ? "descending" : "ascending"));
    body.replaceChildren(...samples.found.slice(first, first + PAGE).map((row, place) => {
      const line = element("tr", { tabIndex: place === 0 ? 0 : -1 }, ...COLUMNS.map(([, , show]) => element("td", {}, show(row))));
      line.sample = row;
      if (row === samples.open) line.setAttribute("aria-current", "true");
      return line;
    }));
    byId("found").textContent = `${samples.found.length} of ${packed.rows.length} samples`;
    byId("page-number").textContent = `page ${samples.page + 1} of ${pages}`;
    for (const id of ["page-first", "page-before"]) byId(id).disabled = samples.page === 0;
    for (const id of ["page-after", "page-last"]) byId(id).disabled = samples.page === pages - 1;
  }
  function turn(to) {
    samples.page = to;
    draw();
  }
  byId("page-first").addEventListener("click", () => turn(0));
  byId("page-before").addEventListener("click", () => turn(samples.page - 1));
  byId("page-after").addEventListener("click", () => turn(samples.page + 1));
  byId("page-last").addEventListener("click", () => turn(Infinity));

  // --- one sample ---------------------------------------------------------------------------------------------------
  /** How strongly an advantage is coloured: p1 to p4 above zero, n1 to n4 below, by its size within the sample. */
  function tint(advantage, largest) {
    if (!advantage) return "";
    return (advantage > 0 ? "p" : "n") + Math.min(4, Math.max(1, Math.ceil((4 * Math.abs(advantage)) / Math.max(largest, 1))));
  }
  /** The response: for each writer and part a heading and its tokens, each piece's advantage before it. */
  function response(row) {
    const text = get(row, "text"), pieces = get(row, "pieces"), shown = [];
    const end = given.thinking_end[get(row, "run")], found = text.indexOf(end);
    const thinks = found < 0 ? 0 : found + end.length;
    const largest = Math.max(0, ...pieces.map((piece) => Math.abs(piece[3] ?? 0)));
    let place = 0, token = 0, part = null, block = null;
    const open = (name) => {
      if (part === name) return;
      part = name;
      block = element("div", { className: "said tokens" });
      shown.push(element("p", { className: "part" }, name), block);
    };
    for (const [length, by, trained, advantage, sizes] of pieces) {
      const kind = tint(advantage, largest);
      let stamped = null;
      // Without the tokens' sizes a piece is one, or two where the thinking ends in it.
      const within = thinks - place > 0 && thinks - place < length ? [thinks - place, length - thinks + place] : [length];
      for (const size of sizes ?? within) {
        const start = place;
        place += size;
        token += 1;
        if (!size) continue;
        open(by !== "policy" ? by : start < thinks ? "thinking" : thinks ? "answer" : "response");
        // Once in each block.
        if (trained && stamped !== block) {
          stamped = block;
          block.append(element("span", { className: "value" }, advantage === null ? "trained" : signed(advantage)));
        }
        const said = `${sizes ? `token ${token}, ` : ""}${!trained ? "not trained" : advantage === null ? "trained" : `advantage ${signed(advantage)}`}`;
        block.append(element("span", { className: `token ${kind} ${trained ? "" : "untrained"}`, title: said }, visible(text.slice(start, place))));
      }
    }
    return shown;
  }
  /** Those made for the same prompt in the same step; of trees, each below what it goes on from. */
  function relatives(row) {
    const same = ["run", "place", "step", "prompt_index", "draw"];
    const all = packed.rows.filter((one) => same.every((name) => get(one, name) === get(row, name)));
    const button = (one) => {
      const made = element("button", { type: "button" }, `${get(one, "number")}${get(one, "branch").map((b) => `.${b}`).join("")}: reward ${number(get(one, "reward"))}`);
      if (one === row) made.setAttribute("aria-current", "true");
      made.addEventListener("click", () => show(one));
      return made;
    };
    const below = (parent) => {
      const children = all.filter((one) => get(one, "number") === get(parent, "number")
        && get(one, "branch").length === get(parent, "branch").length + 1
        && get(parent, "branch").every((step, place) => get(one, "branch")[place] === step));
      if (!children.length) return [];
      return [element("ul", { className: "tree" }, ...children.map((one) =>
        element("li", {}, button(one), ` from token ${get(one, "fork")} on`, ...below(one))))];
    };
    const roots = all.filter((one) => !get(one, "branch").length);
    if (all.length < 2) return [];
    const tree = all.length > roots.length;
    const list = tree ? roots.map((one) => element("div", {}, button(one), ...below(one))) : roots.map(button);
    return [element("p", { className: "part" }, tree ? "tree" : "others of the same prompt"), element("div", { className: tree ? "" : "others" }, ...list)];
  }
  function show(row) {
    samples.open = row;
    const told = [["from", packed.places[get(row, "place")]], ["step", number(get(row, "step"))], ["reward", number(get(row, "reward"))],
      ["advantage", signed(get(row, "advantage"))], ["tokens", number(get(row, "length"))], ["ended by", get(row, "finish") || "–"]];
    if (given.runs.length > 1) told.unshift(["run", given.runs[get(row, "run")]]);
    if (get(row, "right") !== null) told.push(["right", get(row, "right") ? "yes" : "no"]);
    for (const name of ["source", "level"]) if (get(row, name) !== "") told.push([name, visible(get(row, name))]);
    for (const [name, value] of Object.entries(get(row, "terms") ?? {})) told.push([`reward: ${visible(name)}`, number(value)]);
    const facts = element("dl", {}, ...told.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
    const place = byId("sample");
    place.replaceChildren(
      element("h3", {}, `Problem ${number(get(row, "prompt_index"))}, sample ${get(row, "number")}${get(row, "branch").map((b) => `.${b}`).join("")}`), facts,
      element("p", { className: "part" }, "prompt"), element("div", { className: "said" }, visible(get(row, "prompt"))),
      element("p", { className: "part" }, "reference"), element("div", { className: "said" }, visible(get(row, "answer"))),
      ...response(row), ...relatives(row));
    place.hidden = false;
    for (const line of body.rows) line.toggleAttribute("aria-current", false);
    for (const line of body.rows) if (line.sample === row) line.setAttribute("aria-current", "true");
    place.focus({ preventScroll: true });
    place.scrollIntoView({ block: "nearest" });
  }

  // --- mouse and keys -----------------------------------------------------------------------------------------------
  body.addEventListener("click", (event) => {
    const line = event.target.closest("tr");
    if (line) show(line.sample);
  });
  function focusRow(place) {
    if (place < 0 || place >= body.rows.length) return;
    for (const line of body.rows) line.tabIndex = -1;
    body.rows[place].tabIndex = 0;
    body.rows[place].focus();
  }
  body.addEventListener("keydown", (event) => {
    const place = [...body.rows].indexOf(event.target.closest("tr"));
    const act = { ArrowDown: () => focusRow(place + 1), ArrowUp: () => focusRow(place - 1), Home: () => focusRow(0),
      End: () => focusRow(body.rows.length - 1), Enter: () => show(body.rows[place].sample), " ": () => show(body.rows[place].sample) }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, textarea");
    if (event.key === "Escape") {
      const current = [...body.rows].findIndex((line) => line.sample === samples.open);
      focusRow(Math.max(0, current));
    } else if (!typing && event.key === "/") {
      event.preventDefault();
      form.elements.text.focus();
    } else if (!typing && (event.key === "n" || event.key === "p")) {
      turn(samples.page + (event.key === "n" ? 1 : -1));
      focusRow(0);
    }
  });
  let waiting = 0;
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 120); });
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => { event.preventDefault(); filter(); });

  const training = packed.places.indexOf("training");
  const first = kept.all.filters ?? (training < 0 ? {} : { place: String(training) });
  for (const [name, value] of Object.entries(first)) if (form.elements[name]) form.elements[name].value = value;
  filter();
  if (kept.all.scroll) { scrollTo(0, kept.all.scroll); kept.set("scroll", 0); }
  document.documentElement.dataset.ready = "true";
})();
