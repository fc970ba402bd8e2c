// The status page of hvpd. It asks status.json every two seconds and draws the answer. Texts of users, such as names,
// tenants, messages, is set as text, never as HTML: the Content-Security-Policy refuses the other way, too.
"use strict";

const PATIENCE = 5000; // Milliseconds for an answer.

const page = {
  instance: "", // Of the server; a restarted one has another, and begins its samples anew.
  interval: 2,
  kept: 450,
  samples: [],
  bounds: [],
  range: 300, // Seconds that the charts show.
  answered: null, // Milliseconds since 1970 of the last answer.
  lost: null, // Since when there is none.
  asking: null,
  timer: 0,
};

// Formats

const whole = new Intl.NumberFormat("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });
const clock = new Intl.DateTimeFormat([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
const day = new Intl.DateTimeFormat([], { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit", hourCycle: "h23" });

function digits(value, most = 3) {
  return value === 0 ? "0" : String(Number(value.toPrecision(most)));
}

function count(value) {
  return value < 100000 ? whole.format(value) : compact.format(value);
}

function rate(value) {
  return value >= 100 ? whole.format(Math.round(value)) : digits(value);
}

function seconds(value) {
  if (value === 0) return "0 s";
  if (value < 1e-3) return `${digits(value * 1e6)} µs`;
  if (value < 1) return `${digits(value * 1e3)} ms`;
  return `${digits(value)} s`;
}

function span(value) {
  const minutes = Math.floor(value / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
  if (minutes < 1) return `${Math.floor(value)} s`;
  if (hours < 1) return `${minutes} min ${Math.floor(value % 60)} s`;
  if (days < 1) return `${hours} h ${minutes % 60} min`;
  return `${days} d ${hours % 24} h`;
}

function bytes(value) {
  let unit = 0;
  while (value >= 1024 && unit < 5) { value /= 1024; unit += 1; }
  return `${digits(value)} ${["B", "KiB", "MiB", "GiB", "TiB", "PiB"][unit]}`;
}

function percent(share) {
  return share > 0 && share < 0.001 ? "<0.1 %" : `${digits(100 * share, share < 0.1 ? 2 : 3)} %`;
}

function moment(time) {
  const far = Math.abs(Date.now() / 1000 - time) > 43200;
  return (far ? day : clock).format(new Date(time * 1000));
}

// Elements

const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function shape(name, attributes = {}, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// Text that has not changed is left alone, so that it can be selected, and is not read out again.
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function find(id) {
  return document.getElementById(id);
}

// Tiles

const tiles = new Map();

function tile(name, value, detail, { share = null, mood = "" } = {}) {
  let parts = tiles.get(name);
  if (!parts) {
    const [label, shown, below] = ["label", "value", "detail"].map((kind) => element("span", { class: kind }));
    const fill = element("i"), meter = element("span", { class: "meter", "aria-hidden": "true" }, fill);
    const item = element("li", { class: "tile" }, label, shown, below, meter);
    label.textContent = name;
    find("tiles").append(item);
    parts = { item, shown, below, meter, fill };
    tiles.set(name, parts);
  }
  say(parts.shown, value);
  say(parts.below, detail);
  parts.item.className = `tile ${mood}`;
  parts.meter.hidden = share === null;
  parts.fill.style.width = `${100 * Math.min(share ?? 0, 1)}%`;
}

function drawTiles({ now, memory }) {
  const per = now.rate_seconds ? `mean of ${Math.round(now.rate_seconds)} s` : "no figures yet";
  tile("Products a second", rate(now.products_per_second), per);
  tile("Vectors a second", rate(now.columns_per_second), per);
  tile("Mean batch width", now.width === null ? "–" : digits(now.width), now.width === null ? "nothing launched" : "vectors in a launch");
  const full = now.pending_limit ? now.pending / now.pending_limit : 0;
  tile("Pending", count(now.pending), `vectors of ${count(now.pending_limit)}`, { share: full, mood: full > 0.8 ? "bad" : "" });
  tile("In flight", count(now.in_flight), "vectors launched");
  tile("Open streams", count(now.streams), `${count(now.calls)} ${now.calls === 1 ? "call" : "calls"} in all`);
  const resident = now.budget_bytes ? now.resident_bytes / now.budget_bytes : 0;
  const used = memory.reduce((sum, each) => sum + each.in_use_bytes, 0);
  const limit = memory.reduce((sum, each) => sum + each.limit_bytes, 0);
  const device = limit ? `; device ${bytes(used)} of ${bytes(limit)}` : "";
  tile("Resident", bytes(now.resident_bytes), `of ${bytes(now.budget_bytes)}${device}`, { share: resident, mood: used > 0.95 * limit ? "bad" : "" });
  const failing = now.failures_per_second > 0;
  tile("Errors a minute", rate(60 * now.failures_per_second), `${count(now.failures)} since the start`, { mood: failing ? "warn" : "" });
}

function drawSince({ now }) {
  const padding = now.launched_columns ? now.padding_columns / now.launched_columns : 0;
  const { compiled = 0, cached = 0, failed = 0 } = now.compiles;
  say(find("since"), `Since the start: ${count(now.products)} products of ${count(now.columns)} vectors; ${percent(padding)} of what was `
    + `launched was padding; points: ${count(now.points)} made, ${count(now.points_remade)} of them again; programs: ${count(compiled)} compiled, `
    + `${count(cached)} taken from the cache, ${count(failed)} failed.`);
}

// The top

const STATES = { serving: ["serving", "good"], warming: ["warming up", ""], draining: ["draining", ""] };

function drawTop(data) {
  const [said, mood] = STATES[data.state] ?? [data.state, ""];
  const pill = find("state");
  say(pill, said);
  pill.className = `pill ${mood}`;
  document.title = `${said} · hvpd`;
  const { version, jax, platform, device, devices, address } = data.facts;
  const several = devices === "1" ? "" : ` × ${devices}`;
  const facts = [
    ["Version", version],
    ["jax", jax],
    ["Device", device.toLowerCase() === platform ? `${platform}${several}` : `${device}${several} (${platform})`],
    ["Serves at", address],
    ["Up for", span(data.uptime)],
  ];
  const list = find("facts");
  facts.forEach(([name, value], index) => {
    if (!list.children[index]) list.append(element("div", {}, element("dt"), element("dd")));
    const [term, description] = list.children[index].children;
    say(term, name);
    say(description, value);
  });
}

// Charts

const charts = [];
const PAD = { left: 54, right: 10, top: 8, bottom: 22 };

// One figure: its caption tells the values at the cursor, which pointer and arrow keys move, else the last ones.
class Chart {
  constructor(title) {
    this.title = title;
    this.cursor = null;
    this.when = element("span", { class: "when" });
    this.legend = element("span", { class: "legend" });
    this.svg = shape("svg", { role: "img", tabindex: "0" });
    const heading = element("span", { class: "title" });
    heading.textContent = title;
    find("charts").append(element("figure", { class: "chart" }, element("figcaption", {}, heading, this.when, this.legend), this.svg));
    this.entries = new Map();
    new ResizeObserver(() => this.draw()).observe(this.svg);
    charts.push(this);
  }

  tell(name, color, value) {
    let shown = this.entries.get(name);
    if (!shown) {
      shown = element("b");
      const key = element("span", { class: `key ${color}`, "aria-hidden": "true" });
      this.legend.append(element("span", {}, key, `${name} `, shown));
      this.entries.set(name, shown);
    }
    say(shown, value);
  }

  begin() {
    const { width, height } = this.svg.getBoundingClientRect();
    this.width = Math.max(width, 120);
    this.height = Math.max(height, 80);
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    this.marks = [];
    return this;
  }

  put(name, attributes, text) {
    this.marks.push(shape(name, attributes, text));
  }

  end(description) {
    this.svg.replaceChildren(...this.marks);
    if (this.svg.getAttribute("aria-label") !== description) this.svg.setAttribute("aria-label", description);
  }

  rule(y, label) {
    this.put("line", { class: "grid", x1: PAD.left, x2: this.width - PAD.right, y1: y, y2: y });
    this.put("text", { x: PAD.left - 7, y: y + 4, "text-anchor": "end" }, label);
  }
}

class Lines extends Chart {
  constructor(title, series, { format, logarithmic = false, unit = "" }) {
    super(title);
    Object.assign(this, { series, format, logarithmic, unit });
    this.svg.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.release());
    this.svg.addEventListener("blur", () => this.release());
    this.svg.addEventListener("keydown", (event) => this.press(event));
  }

  x(time) {
    return PAD.left + (1 - (page.latest - time) / page.range) * (this.width - PAD.left - PAD.right);
  }

  point(at) {
    const shown = visible();
    if (!shown.length) return;
    const far = (sample) => Math.abs(this.x(sample.t) - at);
    this.cursor = shown.reduce((best, sample) => (far(sample) < far(best) ? sample : best)).i;
    this.draw();
  }

  release() {
    this.cursor = null;
    this.draw();
  }

  press(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.release();
    if (!step) return;
    event.preventDefault();
    const shown = visible();
    const index = this.cursor === null ? shown.length - 1 : shown.findIndex((sample) => sample.i === this.cursor) + step;
    this.cursor = shown[Math.min(Math.max(index, 0), shown.length - 1)]?.i ?? null;
    this.draw();
  }

  scale(values) {
    const bottom = this.height - PAD.bottom, room = bottom - PAD.top;
    if (this.logarithmic) {
      const low = values.length ? Math.floor(Math.log10(Math.min(...values))) : -4;
      const high = Math.max(values.length ? Math.ceil(Math.log10(Math.max(...values))) : 0, low + 1);
      const ticks = Array.from({ length: high - low + 1 }, (_, index) => 10 ** (low + index));
      const y = (value) => bottom - ((Math.log10(Math.max(value, 10 ** low)) - low) / (high - low)) * room;
      return { y, ticks: ticks.length > 5 ? ticks.filter((_, index) => index % 2 === 0) : ticks };
    }
    const most = Math.max(...values, 0), step = nice(most / 4 || 0.25);
    const top = Math.max(Math.ceil(most / step), 1) * step;
    const ticks = Array.from({ length: Math.round(top / step) + 1 }, (_, index) => index * step);
    return { y: (value) => bottom - (value / top) * room, ticks };
  }

  draw() {
    this.begin();
    const shown = visible();
    const values = this.series.flatMap(({ get }) => shown.map(get)).filter((value) => value !== null && (value > 0 || !this.logarithmic));
    const { y, ticks } = this.scale(values);
    for (const tick of ticks) this.rule(y(tick), this.format(tick));
    for (const share of [0, 0.5, 1]) {
      const anchor = ["start", "middle", "end"][2 * share];
      const x = PAD.left + share * (this.width - PAD.left - PAD.right);
      this.put("text", { x, y: this.height - 5, "text-anchor": anchor }, share === 1 ? "now" : `−${span((1 - share) * page.range).replace(" 0 s", "")}`);
    }
    for (const { color, get, thin, area } of this.series) {
      for (const piece of pieces(shown, get)) {
        const points = piece.map((sample) => `${this.x(sample.t).toFixed(1)} ${y(get(sample)).toFixed(1)}`);
        if (points.length === 1) points.push(points[0]);
        const line = `M${points.join("L")}`;
        const [first, last] = [piece[0], piece.at(-1)].map((sample) => this.x(sample.t).toFixed(1));
        const base = this.height - PAD.bottom;
        if (area) this.put("path", { class: `area ${color}`, d: `${line}L${last} ${base}L${first} ${base}Z` });
        this.put("path", { class: `line ${color}${thin ? " thin" : ""}`, d: line });
      }
    }
    const chosen = shown.find((sample) => sample.i === this.cursor);
    if (chosen) {
      const x = this.x(chosen.t);
      this.put("line", { class: "cursor", x1: x, x2: x, y1: PAD.top, y2: this.height - PAD.bottom });
    }
    const told = chosen ?? shown.at(-1);
    say(this.when, chosen ? clock.format(new Date(chosen.t * 1000)) : "");
    const groups = new Map();
    for (const { name, color, get } of this.series) {
      const value = told ? get(told) : null;
      const entry = groups.get(name) ?? { color, values: [] };
      entry.values.push(value === null ? "–" : this.format(value));
      groups.set(name, entry);
    }
    for (const [name, { color, values: said }] of groups) this.tell(name, color, said.join(" · ") + this.unit);
    const last = [...groups].map(([name, { values: said }]) => `${name} ${said.join(", ")}${this.unit}`).join("; ");
    const most = values.length ? `; at most ${this.format(Math.max(...values))}` : "";
    this.end(`${this.title}, the last ${span(page.range).replace(" 0 s", "")}. ${chosen ? this.when.textContent : "Now"}: ${last}${most}.`);
  }
}

class Columns extends Chart {
  draw() {
    this.begin();
    const sums = page.bounds.map(() => 0).concat(0);
    for (const sample of visible()) sample.w.forEach((value, index) => { sums[index] += value; });
    const names = page.bounds.map((bound, index) => (index > 1 ? `≤ ${bound}` : String(bound))).concat(`> ${page.bounds.at(-1) ?? ""}`);
    const all = sums.reduce((sum, value) => sum + value, 0);
    const used = Math.max(sums.findLastIndex((value) => value > 0) + 1, 6);
    const bottom = this.height - PAD.bottom, left = PAD.left, step = (this.width - left - PAD.right) / used;
    const most = Math.max(...sums.map((value) => (all ? value / all : 0)), 0.1);
    const top = [0.25, 0.5, 1].find((bound) => bound >= most);
    const y = (share) => bottom - (share / top) * (bottom - PAD.top - 12);
    for (const part of [0, 0.5, 1]) this.rule(y(part * top), percent(part * top));
    for (let index = 0; index < used; index += 1) {
      const middle = left + (index + 0.5) * step, share = all ? sums[index] / all : 0;
      if (share) {
        const height = Math.max(bottom - y(share), 1);
        this.put("rect", { class: "column c1", x: middle - step * 0.34, y: bottom - height, width: step * 0.68, height, rx: 2 });
        this.put("text", { x: middle, y: bottom - height - 4, "text-anchor": "middle" }, percent(Number(share.toPrecision(2))));
      }
      this.put("text", { x: middle, y: this.height - 5, "text-anchor": "middle" }, names[index]);
    }
    this.tell("products, by the vectors in their launch", "c1", count(all));
    const told = sums.map((value, index) => [names[index], value]).filter(([, value]) => value).map(([name, value]) => `width ${name}: ${percent(value / all)}`);
    this.end(`${this.title}, the last ${span(page.range).replace(" 0 s", "")}: ${told.join("; ") || "no products"}.`);
  }
}

function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].find((factor) => factor * power >= value) * power;
}

function visible() {
  return page.samples.filter((sample) => sample.t >= page.latest - page.range);
}

// The points of one line. It ends at a missing value or sample.
function pieces(samples, get) {
  const found = [];
  let before = null;
  for (const sample of samples) {
    if (get(sample) === null) { before = null; continue; }
    if (before && sample.t - before.t < 3 * page.interval) found.at(-1).push(sample);
    else found.push([sample]);
    before = sample;
  }
  return found;
}

const spread = (key, index) => (sample) => sample[key]?.[index] ?? null;

function makeCharts() {
  new Lines("Throughput", [
    { name: "vectors/s", color: "c1", area: true, get: (sample) => sample.c / sample.s },
    { name: "products/s", color: "c2", get: (sample) => sample.p / sample.s },
  ], { format: (value) => (value >= 10000 ? compact.format(value) : rate(value)) });
  const latency = [["request", "c1", "r"], ["queue", "c2", "q"], ["compute", "c3", "k"]];
  new Lines("Latency of products, median (solid) · p99 (dashed)", latency.flatMap(([name, color, key]) => [
    { name, color, get: spread(key, 0) },
    { name, color, thin: true, get: spread(key, 1) },
  ]), { format: seconds, logarithmic: true });
  new Columns("Batch width");
  new Lines("Waiting and running", [
    { name: "pending", color: "c1", area: true, get: (sample) => sample.n },
    { name: "in flight", color: "c2", get: (sample) => sample.l },
  ], { format: (value) => (value >= 10000 ? compact.format(value) : digits(value)), unit: " vectors" });
}

// Tables

// Rows are kept by their key and only their text changes. The roles say again what the elements are, since on a phone they are laid
// out as a grid, which takes that from them in some browsers.
class Table {
  constructor(place, caption, columns, empty, most = Infinity) {
    Object.assign(this, { columns, most, all: false, items: [], key: null });
    this.rows = new Map();
    this.body = element("tbody", { role: "rowgroup" });
    const headings = columns.map(({ title, number }) => element("th", { scope: "col", role: "columnheader", ...(number && { class: "number" }) }, title));
    const label = element("caption", { class: "unseen" }, caption);
    const head = element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...headings));
    this.table = element("table", { role: "table" }, label, head, this.body);
    this.empty = element("p", { class: "empty" }, empty);
    this.more = element("button", { type: "button", class: "more" });
    this.more.addEventListener("click", () => {
      this.all = !this.all;
      this.draw(this.items, this.key);
    });
    find(place).append(this.table, this.empty, this.more);
  }

  draw(items, key) {
    Object.assign(this, { items, key });
    const rows = (this.all ? items : items.slice(0, this.most)).map((item) => {
      const name = key(item);
      const row = this.rows.get(name) ?? this.row();
      this.columns.forEach(({ fill }, index) => fill(row.children[index], item));
      row.className = item.expected ? "dim" : "";
      return [name, row];
    });
    this.rows = new Map(rows);
    const wanted = [...this.rows.values()];
    if (wanted.length !== this.body.children.length || wanted.some((row, index) => this.body.children[index] !== row)) {
      const focused = document.activeElement;
      this.body.replaceChildren(...wanted);
      if (this.body.contains(focused)) focused.focus();
    }
    this.table.hidden = !items.length;
    this.empty.hidden = Boolean(items.length);
    this.more.hidden = items.length <= this.most;
    say(this.more, this.all ? `Show the first ${this.most} only` : `Show all ${items.length}`);
    this.more.setAttribute("aria-expanded", String(this.all));
  }

  row() {
    return element("tr", { role: "row" }, ...this.columns.map(({ title, number, over }, index) => (index
      ? element("td", { role: "cell", class: [number && "number", over].filter(Boolean).join(" "), "data-label": title })
      : element("th", { role: "rowheader", scope: "row" }))));
  }
}

// Puts a line of text, a smaller one below it, a tag and a bar into a cell; those that are not given are not there.
function fill(cell, text, { minor = "", reason = "", tag = "", mood = "", share = null } = {}) {
  const wanted = JSON.stringify([text, minor, reason, tag, mood, share === null ? null : Math.round(1000 * share)]);
  if (cell.shown === wanted) return;
  cell.shown = wanted;
  const parts = [];
  if (text) parts.push(element("span", { class: "text" }, text));
  if (tag) parts.push(...(text ? [" "] : []), element("span", { class: `tag ${mood}` }, tag));
  if (minor) parts.push(element("span", { class: "minor" }, minor));
  if (reason) parts.push(element("span", { class: "minor reason" }, reason));
  if (share !== null) {
    const bar = element("i");
    bar.style.width = `${100 * Math.min(share, 1)}%`;
    parts.push(element("span", { class: "share", "aria-hidden": "true" }, bar));
  }
  cell.replaceChildren(...parts);
}

const amount = (value, format) => (value === null ? "–" : format(value));
const CHECKS = { passed: "good", failed: "bad", undecided: "warn", pending: "" };
const tables = {};

function makeTables() {
  tables.objectives = new Table("objectives", "Objectives: those in trouble first, then by products a second", [
    { title: "Name", fill: (cell, row) => fill(cell, row.names.length ? row.names.join(", ") : row.digest.slice(0, 12), {
      tag: row.trouble,
      mood: "bad",
      minor: [
        row.names.length ? row.digest.slice(0, 12) : "no name",
        row.more_names ? `${row.more_names} more names` : "",
        `registered ${moment(row.created)}`,
        row.counted_as ? `its products are counted as ${row.counted_as}` : "",
      ].filter(Boolean).join(" · "),
      reason: row.reason,
    }) },
    { title: "n", number: true, fill: (cell, row) => fill(cell, row.n ? whole.format(row.n) : "–") },
    { title: "dtype", fill: (cell, row) => fill(cell, row.dtype || "–", { minor: row.precision === "highest" ? "" : row.precision }) },
    { title: "Mode", over: "two", fill: (cell, row) => fill(cell, row.mode.replaceAll("_", "_\u200b") || "–") },
    { title: "Check", fill: (cell, row) => {
      fill(cell, row.check ? "" : "–", { tag: row.check, mood: CHECKS[row.check] ?? "" });
      if (cell.title !== row.check_reason) cell.title = row.check_reason;
    } },
    { title: "Products", number: true, fill: (cell, row) => fill(cell, amount(row.products, count)) },
    { title: "Products/s", number: true, fill: (cell, row) => fill(cell, amount(row.products_per_second, rate)) },
    { title: "Device time", number: true, fill: (cell, row) => fill(cell, amount(row.device_seconds, seconds)) },
  ], "No objectives to show.", 12);
  tables.tenants = new Table("tenants", "Tenants by their use of the device", [
    { title: "Tenant", fill: (cell, row) => fill(cell, row.name) },
    { title: "Products", number: true, fill: (cell, row) => fill(cell, count(row.products)) },
    { title: "Products/s", number: true, fill: (cell, row) => fill(cell, rate(row.products_per_second)) },
    { title: "Vectors", number: true, fill: (cell, row) => fill(cell, count(row.columns)) },
    { title: "Device time", number: true, fill: (cell, row) => fill(cell, seconds(row.device_seconds)) },
    { title: "Share now", number: true, fill: (cell, row) => fill(cell, percent(row.device_share), { share: row.device_share }) },
  ], "There was no product yet.", 8);
  tables.residency = new Table("residency", "Resident bytes, by kind", [
    { title: "Kind", fill: (cell, row) => fill(cell, row.kind) },
    { title: "Bytes", number: true, fill: (cell, row) => fill(cell, bytes(row.bytes), { share: row.share }) },
    { title: "Hits", number: true, fill: (cell, row) => fill(cell, count(row.hits)) },
    { title: "Misses", number: true, fill: (cell, row) => fill(cell, count(row.misses)) },
    { title: "Hit rate", number: true, fill: (cell, row) => fill(cell, row.hits + row.misses ? percent(row.hits / (row.hits + row.misses)) : "–") },
    { title: "Evictions", number: true, fill: (cell, row) => fill(cell, count(row.evictions)) },
  ], "Nothing is resident.");
  tables.errors = new Table("errors", "Recent errors, the last first", [
    { title: "Time", fill: (cell, row) => fill(cell, moment(row.time)) },
    { title: "Error", over: "two", fill: (cell, row) => fill(cell, row.code, { minor: row.reason === row.code ? "" : row.reason }) },
    { title: "Method", over: "two", fill: (cell, row) => fill(cell, row.method || "–") },
    { title: "Tenant", over: "wrap", fill: (cell, row) => fill(cell, row.tenant || "–") },
    { title: "Message", over: "all wrap", fill: (cell, row) => fill(cell, row.message || "–", {
      minor: [row.expected ? "clients try again by themselves" : "", row.request_id ? `request ${row.request_id}` : ""].filter(Boolean).join(" · "),
    }) },
    { title: "Times", number: true, fill: (cell, row) => fill(cell, count(row.count)) },
  ], "No errors since the server started.", 6);
}

function drawTables(data) {
  const { objectives, tenants, residency, failures, now } = data;
  tables.objectives.draw(objectives.rows, (row) => row.digest);
  const more = objectives.matching - objectives.rows.length, filtered = objectives.matching < objectives.total;
  const hidden = more ? `${whole.format(more)} more are not shown: filter for them.` : "";
  say(find("objectives-more"), [filtered ? `${whole.format(objectives.matching)} of ${whole.format(objectives.total)} match.` : "", hidden].join(" ").trim());
  tables.tenants.draw(tenants.rows, (row) => row.name);
  const others = tenants.total - tenants.rows.length;
  say(find("tenants-more"), others ? `${whole.format(others)} more have used less.` : "");
  tables.residency.draw(residency.map((row) => ({ ...row, share: now.budget_bytes ? row.bytes / now.budget_bytes : 0 })), (row) => row.kind);
  tables.errors.draw(failures, (row) => JSON.stringify([row.code, row.reason, row.method, row.tenant, row.message]));
}

// Asking

function take(data) {
  if (data.instance !== page.instance) page.samples = [];
  page.instance = data.instance;
  page.interval = data.interval;
  page.kept = data.kept;
  page.bounds = data.width_bounds;
  const known = page.samples.at(-1)?.i ?? 0;
  page.samples = [...page.samples, ...data.samples.filter((sample) => sample.i > known)].slice(-page.kept);
  page.latest = page.samples.at(-1)?.t ?? data.time;
  drawTop(data);
  drawTiles(data);
  drawSince(data);
  drawTables(data);
  for (const chart of charts) chart.draw();
}

function answered() {
  page.answered = Date.now();
  page.lost = null;
  find("lost").hidden = true;
  find("main").classList.remove("stale");
}

function unanswered(why) {
  page.lost ??= page.answered ?? Date.now();
  const since = clock.format(new Date(page.lost));
  say(find("lost-said"), `${why} since ${since}.`);
  say(find("lost-for"), `That was ${span((Date.now() - page.lost) / 1000)} ago.${page.answered ? " The values below are from then." : ""} Trying again.`);
  find("lost").hidden = false;
  find("main").classList.add("stale");
  const pill = find("state");
  say(pill, "no answer");
  pill.className = "pill bad";
  document.title = "no answer · hvpd";
}

function rest() {
  clearTimeout(page.timer);
  page.timer = 0;
}

async function refresh() {
  rest();
  page.asking?.abort();
  const asking = page.asking = new AbortController();
  const patience = setTimeout(() => asking.abort(), PATIENCE);
  const query = new URLSearchParams({ instance: page.instance, since: page.samples.at(-1)?.i ?? 0, filter: find("filter").value });
  let why = "The server does not answer";
  try {
    const response = await fetch(`status.json?${query}`, { cache: "no-store", credentials: "omit", signal: asking.signal });
    why = `The server answers with status ${response.status}`;
    if (!response.ok) throw new Error(why);
    why = "The server’s answer is cut off";
    const data = await response.json();
    if (asking !== page.asking) return;
    take(data);
    answered();
  } catch {
    if (asking !== page.asking) return; // Another question has taken its place.
    unanswered(why);
  } finally {
    clearTimeout(patience);
    if (asking === page.asking && !document.hidden) page.timer = setTimeout(refresh, 1000 * page.interval);
  }
}

function begin() {
  page.latest = Date.now() / 1000;
  makeCharts();
  makeTables();
  document.addEventListener("visibilitychange", () => (document.hidden ? rest() : refresh()));
  find("ranges").addEventListener("change", (event) => {
    page.range = Number(event.target.value);
    for (const chart of charts) chart.draw();
  });
  let typing = 0;
  find("filter").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(refresh, 200);
  });
  refresh();
}

begin();
