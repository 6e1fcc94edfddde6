"use strict";
(() => {
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("manifest").textContent);
const root = document.documentElement;
const S = { v: 0, kind: "", l: 0, h: 0, q: -1, k: -1, lock: false, side: 0, first: 0, merge: 0, dark: 0, stat: "maps", sort: "layers", min: 0, over: "", find: "", shade: "head" };
const view = () => data.views[S.v];
const layer = () => view().layers[S.l];

// ---- bytes

const bytes = new Map();
function chunk(i) {
  if (!bytes.has(i)) bytes.set(i, (async () => {
    const text = atob($("chunk" + i).textContent);
    const packed = new Uint8Array(text.length);
    for (let j = 0; j < text.length; j++) packed[j] = text.charCodeAt(j);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  })());
  return bytes.get(i);
}

const decoded = new Map();  // the heads looked at last
async function head(v, l, h) {
  const id = v + "." + l + "." + h;
  if (decoded.has(id)) return decoded.get(id);
  const L = data.views[v].layers[l], raw = await chunk(L.chunk), { heads, n, m, top } = L;
  const f = new DataView(raw.buffer, raw.byteOffset), w = new Float32Array(n * m);
  const unit = (q) => { if (!L.signed) { q /= 255; return q * q; } q = (q - 128) / 127; return q * Math.abs(q); };
  const table = Float32Array.from({ length: 256 }, (_, q) => unit(q));
  let rest = null;
  if (!top) {
    const codes = 4 * heads * n + h * n * m;
    for (let i = 0; i < n; i++) {
      const s = f.getFloat32(4 * (h * n + i), true);
      for (let j = 0, at = i * m; j < m; j++, at++) w[at] = s * table[raw[codes + at]];
    }
  } else {
    w.fill(NaN);
    rest = new Float32Array(n);
    const all = heads * n, low = 8 * all;
    for (let i = 0; i < n; i++) {
      const row = h * n + i, s = f.getFloat32(4 * row, true);
      rest[i] = f.getFloat32(4 * (all + row), true);
      if (rest[i] === 0) w.fill(0, i * m, (i + 1) * m);  // nothing was left out
      for (let t = 0; t < top; t++) {
        const at = row * top + t, key = raw[low + at] + 256 * raw[low + all * top + at];
        w[i * m + key] = s * table[raw[low + 2 * all * top + at]];
      }
    }
  }
  const made = { n, m, w, rest };
  if (decoded.size > 24) decoded.delete(decoded.keys().next().value);
  decoded.set(id, made);
  return made;
}

// ---- tokens, and pieces merged to words

const shown = (text) => text.replace(/^ (?=.)/, "").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +$/, (s) => "␣".repeat(s.length));
const groupsOf = new Map();
function groups(name) {
  const id = S.v + name + S.merge;
  if (groupsOf.has(id)) return groupsOf.get(id);
  const axis = view().axes[name], made = [];
  axis.labels.forEach((text, i) => {
    const last = made[made.length - 1];
    if (S.merge && axis.words && last && axis.words[i] === axis.words[i - 1]) {
      last.stop = i + 1;
      last.text = axis.texts ? axis.texts[axis.words[i]] : last.text + text.replace(/^##/, "");
    } else made.push({ start: i, stop: i + 1, text });
  });
  for (const g of made) g.at = g.stop - g.start > 1 ? g.start + "–" + (g.stop - 1) : "" + g.start;
  groupsOf.set(id, made);
  return made;
}
const quoted = (g) => "‘" + shown(g.text) + "’";

function merged(full, rows, cols) {  // rows are averaged, columns added
  if (rows.length === full.n && cols.length === full.m) return full;
  const n = rows.length, m = cols.length, w = new Float32Array(n * m), rest = full.rest && new Float32Array(n);
  rows.forEach((r, i) => {
    const size = r.stop - r.start;
    cols.forEach((c, j) => {
      let sum = 0, any = false;
      for (let a = r.start; a < r.stop; a++) for (let b = c.start; b < c.stop; b++) {
        const x = full.w[a * full.m + b];
        if (x === x) { sum += x; any = true; }
      }
      w[i * m + j] = any ? sum / size : NaN;
    });
    if (rest) for (let a = r.start; a < r.stop; a++) rest[i] += full.rest[a] / size;
  });
  return { n, m, w, rest };
}

// ---- colours: one hue from dark to light, two for signs; both keep apart for every eye

const RAMPS = {
  light: [[255, 255, 255], [214, 230, 244], [141, 193, 221], [58, 137, 193], [8, 81, 156], [6, 38, 84]],
  dark: [[27, 31, 37], [18, 60, 92], [20, 110, 130], [70, 165, 150], [170, 214, 130], [255, 247, 190]],
  signed: [[145, 65, 5], [224, 130, 20], [253, 200, 130], [250, 250, 250], [190, 190, 225], [128, 115, 172], [64, 15, 95]],
  signedDark: [[255, 190, 110], [214, 120, 30], [110, 62, 25], [27, 31, 37], [60, 62, 120], [120, 118, 205], [196, 196, 255]],
};
const tables = {};
function ramp(signed) {
  const name = signed ? (S.dark ? "signedDark" : "signed") : S.dark ? "dark" : "light";
  if (tables[name]) return tables[name];
  const stops = RAMPS[name], out = new Uint8Array(256 * 3);
  for (let i = 0; i < 256; i++) {
    const x = (i / 255) * (stops.length - 1), a = Math.min(Math.floor(x), stops.length - 2), t = x - a;
    for (let c = 0; c < 3; c++) out[3 * i + c] = Math.round(stops[a][c] * (1 - t) + stops[a + 1][c] * t);
  }
  return (tables[name] = out);
}
const place = (x, most, signed) => {  // 0..255 on a square-root scale
  if (!(most > 0)) return signed ? 128 : 0;
  const r = Math.sqrt(Math.min(1, Math.abs(x) / most));
  return Math.round(signed ? 127.5 + 127.5 * Math.sign(x) * r : 255 * r);
};
const css = (i, signed) => { const t = ramp(signed); return `rgb(${t[3 * i]},${t[3 * i + 1]},${t[3 * i + 2]})`; };
const inkOn = (i, signed) => { const t = ramp(signed); return 0.3 * t[3 * i] + 0.59 * t[3 * i + 1] + 0.11 * t[3 * i + 2] > 140 ? "#14171b" : "#f8f9fa"; };
const number = (x) => x === null || x !== x ? "–" : x === 0 ? "0" : Math.abs(x) < 5e-5 ? x.toExponential(1) : Math.abs(x) >= 100 ? x.toFixed(1) : Math.abs(x) >= 10 ? x.toFixed(2) : x.toFixed(4);

function sized(canvas, width, height) {
  const r = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * r); canvas.height = Math.round(height * r);
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  const c = canvas.getContext("2d");
  c.setTransform(r, 0, 0, r, 0, 0);
  c.imageSmoothingEnabled = false;
  return c;
}
const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const FONT = 'system-ui, "DejaVu Sans", sans-serif';

// ---- all heads

let cells = [];
const stat = (name) => view().stats.find((s) => s.name === name);
const ofKind = (L) => !S.kind || L.kind === S.kind;
function thumbPlaces() {
  const V = view();
  if (!V.places) {
    let at = 0;
    V.places = V.layers.map((L) => { const r = Math.min(26, L.n), c = Math.min(26, L.m), start = at; at += L.heads * r * c; return { start, r, c }; });
    V.half = at;
  }
  return V.places;
}
const small = document.createElement("canvas");
async function drawHeads() {
  const V = view(), drawn = S.v, raw = await chunk(V.thumbs), places = thumbPlaces();
  if (S.v !== drawn) return;
  const by = stat(S.sort), col = stat(S.stat);
  const filter = by || col;
  const range = filter ? bounds(filter) : null;
  const least = filter && S.min > 0 ? range[0] + (range[1] - range[0]) * S.min / 100 : -Infinity;
  $("minbox").hidden = !filter;
  $("minval").textContent = filter && S.min > 0 ? number(least) : "";
  const value = (s, l, h) => s.values[l][h];
  let list = [];
  V.layers.forEach((L, l) => { if (ofKind(L)) for (let h = 0; h < L.heads; h++) list.push({ l, h }); });
  const passes = (c) => !filter || S.min <= 0 || value(filter, c.l, c.h) >= least;
  const rows = [...new Set(list.map((c) => c.l))], most = Math.max(1, ...rows.map((l) => V.layers[l].heads));
  const box = $("heads").parentElement, room = Math.max(220, box.clientWidth - 14), side = 34, gap = 2;
  const cell = Math.max(13, Math.min(64, Math.floor((room - side) / most) - gap - 1));
  let width = room, height;
  if (by) {
    list = list.filter(passes).sort((a, b) => value(by, b.l, b.h) - value(by, a.l, a.h));
    const wide = Math.max(cell, 26), per = Math.max(1, Math.floor((room - 4) / (wide + 4)));
    list.forEach((c, i) => { c.x = 2 + (i % per) * (wide + 4); c.y = 2 + Math.floor(i / per) * (wide + 16); c.s = wide; });
    height = Math.ceil(list.length / per) * (wide + 16) + 4;
  } else {
    const line = new Map(rows.map((l, i) => [l, i]));
    list.forEach((c) => {
      const L = V.layers[c.l], share = L.heads / L.kv;
      c.x = side + c.h * (cell + gap) + (share > 1 ? Math.floor(c.h / share) * 5 : 0);
      c.y = 20 + line.get(c.l) * (cell + gap + 1); c.s = cell;
    });
    height = 22 + rows.length * (cell + gap + 1);
  }
  cells = list;
  const c = sized($("heads"), width, Math.max(height, 30));
  c.font = "10px " + FONT; c.textBaseline = "middle";
  const ink = colour("--soft");
  if (!by) {
    c.fillStyle = ink;
    for (const one of list) if (one.h === 0) { c.textAlign = "right"; c.fillText(V.layers[one.l].label + (S.kind || V.kinds < 2 ? "" : " " + V.layers[one.l].kind[0]), side - 6, one.y + one.s / 2); }
    const L = V.layers[rows[0]];
    if (L) for (const one of list) if (one.l === rows[0]) {
      const share = L.heads / L.kv;
      c.textAlign = "center";
      if (share === 1) c.fillText("" + one.h, one.x + one.s / 2, 9);
      else if (one.h % share === 0) c.fillText("kv " + one.h / share, one.x + (share * (one.s + gap)) / 2, 9);
    }
  }
  const lim = col ? bounds(col) : null, two = col && (col.signed && lim[0] < 0), top = lim && Math.max(Math.abs(lim[0]), Math.abs(lim[1]));
  for (const one of list) {
    const L = V.layers[one.l];
    c.globalAlpha = passes(one) ? 1 : 0.12;
    if (col) {
      const x = value(col, one.l, one.h);
      c.fillStyle = x === null ? colour("--line") : css(two ? place(x, top, true) : Math.round(255 * (x - lim[0]) / ((lim[1] - lim[0]) || 1)), two);
      c.fillRect(one.x, one.y, one.s, one.s);
    } else {
      const p = places[one.l], t = ramp(L.signed), start = (S.first ? V.half : 0) + p.start + one.h * p.r * p.c;
      const image = new ImageData(p.c, p.r);
      for (let i = 0; i < p.r * p.c; i++) {
        const q = raw[start + i];
        image.data.set([t[3 * q], t[3 * q + 1], t[3 * q + 2], 255], 4 * i);
      }
      small.width = p.c; small.height = p.r;
      small.getContext("2d").putImageData(image, 0, 0);
      c.drawImage(small, one.x, one.y, one.s, one.s);
    }
    c.globalAlpha = 1;
    c.lineWidth = 1; c.strokeStyle = colour("--line");
    c.strokeRect(one.x - 0.5, one.y - 0.5, one.s + 1, one.s + 1);
    if (by) { c.fillStyle = ink; c.textAlign = "center"; c.fillText(L.label + "." + one.h, one.x + one.s / 2, one.y + one.s + 7); }
    if (one.l === S.l && one.h === S.h) { c.lineWidth = 2.5; c.strokeStyle = colour("--mark"); c.strokeRect(one.x - 1.5, one.y - 1.5, one.s + 3, one.s + 3); }
  }
}
function bounds(s) {
  const all = s.values.flatMap((row, l) => ofKind(view().layers[l]) ? row : []).filter((x) => x !== null);
  return all.length ? [Math.min(...all), Math.max(...all)] : [0, 0];
}
const cellAt = (e) => cells.find((c) => e.offsetX >= c.x - 1 && e.offsetX <= c.x + c.s + 1 && e.offsetY >= c.y - 1 && e.offsetY <= c.y + c.s + 1);
const statLine = (l, h) => view().stats.map((s) => s.name + " " + number(s.values[l][h])).join(" · ");

// ---- one head

let now = null;  // what is drawn: matrix, groups, geometry
async function drawLarge() {
  const asked = S.v + "." + S.l + "." + S.h + "." + S.merge, L = layer();
  const full = await head(S.v, S.l, S.h);
  if (asked !== S.v + "." + S.l + "." + S.h + "." + S.merge) return;
  const rows = groups(L.q), cols = groups(L.k), mat = merged(full, rows, cols);
  const share = L.heads / L.kv, kv = Math.floor(S.h / share);
  $("name").textContent = `Layer ${L.label}, head ${S.h}` + (L.kind === "self" ? "" : ` (${L.kind})`);
  $("numbers").textContent = statLine(S.l, S.h);
  const family = $("family");
  family.replaceChildren();
  family.hidden = share === 1;
  if (share > 1) {
    const text = document.createElement("span");
    text.textContent = `key/value head ${kv}, read by`;
    family.append(text);
    for (let h = kv * share; h < (kv + 1) * share; h++) {
      const b = document.createElement("button");
      b.textContent = "head " + h; b.setAttribute("aria-pressed", h === S.h);
      b.onclick = () => go({ h });
      family.append(b);
    }
  }
  const room = Math.max(260, $("large").clientWidth - 26), margin = mat.n <= 90 && mat.m <= 90 ? 74 : 30;
  const cell = Math.min(40, Math.min((room - margin) / mat.m, Math.max(380, window.innerHeight - 290 - margin) / mat.n));
  const width = margin + cell * mat.m + 2, height = margin + cell * mat.n + 2;
  now = { mat, rows, cols, cell, margin, width, height, signed: L.signed, same: L.q === L.k };
  scale();
  const c = sized($("map"), width, height);
  sized($("cross"), width, height);
  paint(c);
  drawRamp();
  strips();
  point();
}
function scale() {
  const { mat } = now;
  now.most = 0; now.rowMost = new Float32Array(mat.n);
  for (let i = 0; i < mat.n; i++) for (let j = S.first ? 1 : 0; j < mat.m; j++) {
    const x = Math.abs(mat.w[i * mat.m + j]);
    if (x > now.rowMost[i]) now.rowMost[i] = x;
  }
  for (const x of now.rowMost) if (x > now.most) now.most = x;
}
function paint(c) {
  const { mat, cell, margin, signed, rows, cols } = now, t = ramp(signed), image = new ImageData(mat.m, mat.n);
  for (let i = 0; i < mat.n; i++) for (let j = 0; j < mat.m; j++) {
    const x = mat.w[i * mat.m + j], hidden = S.first && j === 0;
    const q = x !== x || hidden ? (signed ? 128 : 0) : place(x, S.shade === "row" ? now.rowMost[i] : now.most, signed);
    image.data.set([t[3 * q], t[3 * q + 1], t[3 * q + 2], hidden ? 0 : 255], 4 * (i * mat.m + j));
  }
  const off = document.createElement("canvas");
  off.width = mat.m; off.height = mat.n;
  off.getContext("2d").putImageData(image, 0, 0);
  c.clearRect(0, 0, now.width, now.height);
  c.drawImage(off, margin, margin, cell * mat.m, cell * mat.n);
  c.strokeStyle = colour("--line");
  c.strokeRect(margin - 0.5, margin - 0.5, cell * mat.m + 1, cell * mat.n + 1);
  if (S.first) {
    c.save(); c.beginPath(); c.rect(margin, margin, cell, cell * mat.n); c.clip();
    c.globalAlpha = 0.8; c.beginPath();
    for (let y = -cell; y < cell * mat.n; y += 5) { c.moveTo(margin, margin + y + cell); c.lineTo(margin + cell, margin + y); }
    c.stroke(); c.restore();
  }
  labels(c, rows, cols);
}
function labels(c, rows, cols) {
  const { cell, margin } = now, wide = margin > 40;
  c.fillStyle = colour("--soft"); c.font = Math.max(8, Math.min(11, cell)) + "px " + FONT;
  const step = wide ? Math.max(1, Math.ceil(8.5 / cell)) : Math.ceil(40 / cell);
  for (const [list, turned] of [[rows, false], [cols, true]]) list.forEach((g, i) => {
    if (i % step) return;
    const mid = margin + (i + 0.5) * cell, text = wide ? cut(shown(g.text)) : g.at;
    c.save();
    if (turned) { c.translate(mid, margin - 4); c.rotate(-Math.PI / 2); c.textAlign = "left"; } else { c.translate(margin - 4, mid); c.textAlign = "right"; }
    c.textBaseline = "middle";
    c.fillText(text, 0, 0);
    c.restore();
  });
}
const cut = (text) => [...text].length > 11 ? [...text].slice(0, 10).join("") + "…" : text;
function drawRamp() {
  const c = $("ramp").getContext("2d");
  for (let x = 0; x < 160; x++) { c.fillStyle = css(Math.round((x / 159) * 255), now.signed); c.fillRect(x, 0, 1, 10); }
  const most = S.shade === "row" ? null : now.most;
  $("low").textContent = now.signed ? (most === null ? "−" : number(-most)) : "0";
  $("high").textContent = most === null ? "row's largest" : number(most);
}

// ---- pointing: hover shows, click holds

function point() {
  if (!now) return;
  const { mat, cell, margin, rows, cols } = now, c = $("cross").getContext("2d");
  c.clearRect(0, 0, now.width, now.height);
  if (S.q >= rows.length) S.q = -1;
  if (S.k >= cols.length) S.k = -1;
  c.lineWidth = 1.5; c.strokeStyle = colour(S.lock ? "--hold" : "--mark");
  if (S.q >= 0) c.strokeRect(margin - 1, margin + S.q * cell - 0.5, cell * mat.m + 2, cell + 1);
  if (S.k >= 0) c.strokeRect(margin + S.k * cell - 0.5, margin - 1, cell + 1, cell * mat.n + 2);
  if (S.q >= 0 && S.k >= 0) { c.fillStyle = c.strokeStyle; c.globalAlpha = 0.25; c.fillRect(margin + S.k * cell, margin + S.q * cell, cell, cell); c.globalAlpha = 1; }
  $("lock").textContent = S.lock ? "held: Esc lets go" : "";
  read();
  shadeStrips();
  topList();
}
function read() {
  const out = $("readout"), { mat, rows, cols } = now;
  out.replaceChildren();
  delete out.dataset.value;
  const add = (text, tag) => { const e = document.createElement(tag || "span"); e.textContent = text; out.append(e); };
  const name = (g) => { const e = document.createElement("bdi"); e.textContent = quoted(g); out.append(e); add(" [" + g.at + "]"); };
  if (S.q >= 0 && S.k >= 0) {
    const x = mat.w[S.q * mat.m + S.k];
    name(rows[S.q]); add(now.signed ? " → " : " reads "); name(cols[S.k]); add(": ");
    if (x === x) { out.dataset.value = x; add(number(x), "b"); if (!now.signed) add(` (${(100 * x).toFixed(1)} %)`); }
    else add("not among its largest " + layer().top);
  } else if (S.q >= 0) { add("What "); name(rows[S.q]); add(" reads"); }
  else if (S.k >= 0) { add("Who reads "); name(cols[S.k]); }
  else add("Point at a token or a cell; click to hold it.");
  if (S.q >= 0 && mat.rest) add(`; other keys together ${number(mat.rest[S.q])}`);
}
function line() {  // the values that are laid over tokens
  const { mat } = now;
  if (S.side ? S.k < 0 : S.q < 0) return null;
  return S.side ? Float32Array.from({ length: mat.n }, (_, i) => mat.w[i * mat.m + S.k]) : mat.w.subarray(S.q * mat.m, (S.q + 1) * mat.m);
}
function mean() {  // before anything is pointed at: what every token gets, or gives
  const { mat } = now, out = new Float32Array(S.side ? mat.n : mat.m);
  for (let i = 0; i < mat.n; i++) for (let j = 0; j < mat.m; j++) { const x = mat.w[i * mat.m + j]; if (x === x) out[S.side ? i : j] += S.side ? x / mat.m : x / mat.n; }
  return out;
}
function topList() {
  const out = $("list"), o = overlay(), part = o && parts.find((p) => p.name === o.axis);
  const row = part ? Float32Array.from(shades(part)[0]) : line() || mean(), over = part ? part.list : S.side ? now.rows : now.cols;
  const order = [...row.keys()].filter((j) => row[j] === row[j] && row[j] !== 0 && !(S.first && !S.side && j === 0)).sort((a, b) => Math.abs(row[b]) - Math.abs(row[a])).slice(0, 9);
  const most = order.length ? Math.abs(row[order[0]]) : 1;
  out.replaceChildren(...order.map((j) => {
    const li = document.createElement("li");
    const part = (cls, text, tag) => { const e = document.createElement(tag || "span"); e.className = cls; e.textContent = text; li.append(e); return e; };
    part("i", over[j].at); part("t", shown(over[j].text), "bdi");
    const b = part(row[j] < 0 ? "b neg" : "b", ""); b.style.width = (100 * Math.abs(row[j])) / most + "%";
    part("v", number(row[j]));
    return li;
  }));
}

// ---- tokens beside the map

let parts = [];  // {axis, el, spans, groups, asks, answers, picture}
const overlay = () => view().overlays.find((o) => o.name === S.over);
function strips() {
  const L = layer(), box = $("strips");
  box.replaceChildren(); parts = [];
  const names = now.same ? [[L.q, true, true]] : [[L.q, true, false], [L.k, false, true]];
  for (const [name, asks, answers] of names) {
    const axis = view().axes[name], list = groups(name);
    const text = axis.labels.join(""), strong = text.match(/[A-Za-z\u00c0-\u024f\u0370-\u03ff\u0400-\u04ff\u0590-\u08ff\u3040-\u9fff]/);
    const strip = document.createElement("div");
    strip.className = "strip"; strip.dir = strong && /[\u0590-\u08ff]/.test(strong[0]) ? "rtl" : "ltr";
    if (!now.same) { const t = document.createElement("h3"); t.textContent = asks ? "who asks" : "what is read"; strip.append(t); }
    const part = { name, axis, list, asks, answers, spans: [], patches: [] };
    for (const p of axis.parts) if (p.grid) picture(part, p, box);
    list.forEach((g, i) => {
      const p = axis.parts.find((p) => g.start >= p.start && g.start < p.stop);
      if (p.grid) return;
      const e = document.createElement("bdi");
      e.textContent = shown(g.text) || "∅"; e.title = "[" + g.at + "]"; e.dataset.i = i;
      e.onmouseenter = () => hover(part, i);
      e.onclick = () => hold(part, i);
      part.spans.push([i, e]);
      strip.append(e);
      if (/\n/.test(g.text)) strip.append(document.createElement("br"));
    });
    strip.onmouseleave = leave;
    if (part.spans.length) box.append(strip);
    parts.push(part);
  }
}
async function picture(part, p, box) {
  const holder = document.createElement("div"), canvas = document.createElement("canvas");
  holder.className = "picture"; holder.append(canvas); box.prepend(holder);
  const [rows, cols] = p.grid, width = Math.min(380, Math.max(220, $("words").clientWidth - 26)), height = (width * rows) / cols;
  const one = { p, canvas, rows, cols, width, height, source: null };
  part.patches.push(one);
  const at = (e) => {
    const c = Math.min(cols - 1, Math.max(0, Math.floor((e.offsetX / canvas.clientWidth) * cols))), r = Math.min(rows - 1, Math.max(0, Math.floor((e.offsetY / canvas.clientHeight) * rows)));
    return part.list.findIndex((g) => g.start === p.start + r * cols + c);
  };
  canvas.onmousemove = (e) => hover(part, at(e));
  canvas.onclick = (e) => hold(part, at(e));
  canvas.onmouseleave = leave;
  const info = part.axis.picture;
  if (info) {
    const raw = await chunk(info.chunk), [h, w] = info.size, image = new ImageData(w, h);
    for (let i = 0; i < h * w; i++) image.data.set([raw[3 * i], raw[3 * i + 1], raw[3 * i + 2], 255], 4 * i);
    one.source = document.createElement("canvas"); one.source.width = w; one.source.height = h;
    one.source.getContext("2d").putImageData(image, 0, 0);
  }
  if (parts.includes(part)) shadePicture(part, one, ...shades(part));
}
function shades(part) {
  const o = overlay(), aimed = S.side ? part.asks : part.answers;
  if (o && o.axis === part.name) {
    let flat = o.on === "tokens" ? o.values : o.values[S.l][S.h];
    const sums = part.list.map((g) => { let s = 0; for (let i = g.start; i < g.stop; i++) s += flat[i]; return s; });
    return [sums, sums.some((x) => x < 0)];
  }
  if (!aimed) return [null, false];
  return [line() || mean(), now.signed];
}
function shadeStrips() {
  for (const part of parts) {
    const [values, signed] = shades(part), hide = S.first && !S.side && !overlay();
    let most = 0;
    if (values) for (let j = hide ? 1 : 0; j < part.list.length; j++) if (Math.abs(values[j]) > most) most = Math.abs(values[j]);
    const find = S.find.toLowerCase();
    for (const [i, e] of part.spans) {
      const x = values ? values[i] : NaN, q = x === x && !(hide && i === 0) ? place(x, most, signed) : signed ? 128 : 0;
      const plain = !values || (!signed && q < 6);
      e.style.background = plain ? "" : css(q, signed);
      e.style.color = plain ? "" : inkOn(q, signed);
      const mine = (part.asks && i === S.q && !S.side) || (part.answers && i === S.k && (S.side || !part.asks));
      const paired = part.answers && i === S.k;
      e.className = (mine ? (S.lock ? "held " : "at ") : paired ? "at " : "") + (find && part.list[i].text.toLowerCase().includes(find) ? "hit " : "") + (hide && i === 0 ? "out" : "");
    }
    for (const one of part.patches) shadePicture(part, one, values, signed, most);
  }
}
function shadePicture(part, one, values, signed, most) {
  const c = sized(one.canvas, one.width, one.height), { rows, cols, p } = one, w = one.width / cols, h = one.height / rows;
  c.fillStyle = colour("--line"); c.fillRect(0, 0, one.width, one.height);
  if (one.source) { c.imageSmoothingEnabled = true; c.drawImage(one.source, 0, 0, one.width, one.height); }
  const first = part.list.findIndex((g) => g.start === p.start);
  if (values) {
    let top = 0;
    for (let i = 0; i < rows * cols; i++) { const x = Math.abs(values[first + i]); if (x > top) top = x; }
    for (let i = 0; i < rows * cols; i++) {
      const x = values[first + i], t = top > 0 && x === x ? Math.sqrt(Math.abs(x) / top) : 0;
      if (signed) { c.globalAlpha = 0.9 * t; c.fillStyle = css(x < 0 ? 20 : 235, true); }
      else if (one.source) { c.globalAlpha = 0.82 * (1 - t); c.fillStyle = "#0b0e12"; }
      else { c.globalAlpha = 1; c.fillStyle = css(Math.round(255 * t), false); }
      c.fillRect((i % cols) * w, Math.floor(i / cols) * h, w + 0.5, h + 0.5);
    }
    c.globalAlpha = 1;
  }
  const mark = (i, name) => {
    if (i < first || i >= first + rows * cols) return;
    c.lineWidth = 2; c.strokeStyle = colour(name);
    c.strokeRect(((i - first) % cols) * w + 1, Math.floor((i - first) / cols) * h + 1, w - 2, h - 2);
  };
  if (part.answers && S.k >= 0) mark(S.k, "--mark");
  if (part.asks && S.q >= 0) mark(S.q, S.lock ? "--hold" : "--mark");
}
function hover(part, i) {
  if (i < 0) return;
  if (S.lock) {  // the held token stays; what is pointed at is its partner
    if (S.side ? part.asks : part.answers) { S.side ? (S.q = i) : (S.k = i); point(); }
    return;
  }
  const asking = part.asks && (!S.side || !part.answers), answering = part.answers && (S.side || !part.asks);
  S.q = asking ? i : -1; S.k = answering ? i : -1;
  point();
}
function hold(part, i) {
  const asking = part.asks && (!S.side || !part.answers);
  S.lock = true; S.q = asking ? i : -1; S.k = asking ? -1 : i;
  point(); keep();
}
function leave() { if (!S.lock) { S.q = S.k = -1; } else if (S.side) S.q = -1; else S.k = -1; point(); }
function unlock() { S.lock = false; S.q = S.k = -1; point(); keep(); }
const spot = (e) => {
  if (!now) return null;
  const i = Math.floor((e.offsetY - now.margin) / now.cell), j = Math.floor((e.offsetX - now.margin) / now.cell);
  return i >= 0 && j >= 0 && i < now.mat.n && j < now.mat.m ? [i, j] : null;
};

// ---- the address keeps the view

const KEPT = ["v", "kind", "l", "h", "q", "k", "lock", "side", "first", "merge", "dark", "stat", "sort", "min", "over", "find", "shade"];
const START = { ...S };
function keep() {
  const p = new URLSearchParams();
  for (const key of KEPT) if (key === "dark" || (S[key] !== START[key] && (S.lock || !"qk".includes(key)))) p.set(key, Number(S[key]) === S[key] || S[key] === true || S[key] === false ? Number(S[key]) : S[key]);
  try { history.replaceState(null, "", "#" + p); } catch (error) { /* a page inside a notebook has no address */ }
}
function restore() {
  const p = new URLSearchParams(location.hash.slice(1));
  for (const key of KEPT) if (p.has(key)) {
    const text = p.get(key);
    if (typeof START[key] === "string") S[key] = text;
    else if (/^-?\d+$/.test(text)) S[key] = typeof START[key] === "boolean" ? text === "1" : Number(text);
  }
  const most = (x, n) => Math.max(0, Math.min(n - 1, x));
  S.v = most(S.v, data.views.length); S.l = most(S.l, view().layers.length); S.h = most(S.h, layer().heads);
  if (S.kind && !view().layers.some(ofKind)) S.kind = "";
}

// ---- controls

function options(select, list, value) {
  select.replaceChildren(...list.map(([v, text]) => { const o = document.createElement("option"); o.value = v; o.textContent = text; return o; }));
  select.value = value;
  if (select.selectedIndex < 0) select.selectedIndex = 0;
  return select.value;
}
function controls() {
  const V = view(), kinds = [...new Set(V.layers.map((L) => L.kind))];
  V.kinds = kinds.length;
  options($("view"), data.views.map((x, i) => [i, x.name]), S.v);
  $("view").parentElement.hidden = data.views.length < 2;
  S.kind = options($("kind"), [["", "all"], ...kinds.map((k) => [k, k])], S.kind);
  $("kindbox").hidden = kinds.length < 2;
  const names = V.stats.map((s) => [s.name, s.name]);
  S.stat = options($("stat"), [["maps", "maps"], ...names], S.stat);
  S.sort = options($("sort"), [["layers", "layers"], ...names.map(([n]) => [n, n + ", largest first"])], S.sort);
  S.over = options($("over"), [["", "weights"], ...V.overlays.map((o) => [o.name, o.name])], S.over);
  $("overbox").hidden = !V.overlays.length;
  $("min").value = S.min; $("find").value = S.find; $("shade").value = S.shade;
  const press = (id, on) => $(id).setAttribute("aria-pressed", Boolean(on));
  press("first", S.first); press("merge", S.merge); press("dark", S.dark); press("side", S.side);
  $("side").textContent = S.side ? "is read by" : "reads";
  $("merge").hidden = !Object.values(V.axes).some((a) => a.words && new Set(a.words).size < a.words.length);
  root.classList.toggle("dark", Boolean(S.dark));
}
async function go(change) {
  const before = { ...S };
  Object.assign(S, change);
  const L = layer() || view().layers[0];
  S.l = view().layers.indexOf(L); S.h = Math.min(S.h, L.heads - 1);
  if (S.kind && L.kind !== S.kind) { S.l = view().layers.findIndex(ofKind); S.h = Math.min(S.h, layer().heads - 1); }
  if (before.merge !== S.merge || before.v !== S.v) {  // a held token stays held as the word, or the piece, it is now
    const follow = (i, name) => {
      if (i < 0) return -1;
      const old = { ...S }; let at;
      Object.assign(S, { merge: before.merge, v: before.v });
      at = groups(name)[i]; Object.assign(S, old);
      return at ? groups(name).findIndex((g) => g.start <= at.start && at.start < g.stop) : -1;
    };
    const names = [data.views[before.v].layers[S.l]?.q, data.views[before.v].layers[S.l]?.k];
    S.q = names[0] in view().axes ? follow(S.q, names[0]) : -1; S.k = names[1] in view().axes ? follow(S.k, names[1]) : -1;
    if (S.q < 0 && S.k < 0) S.lock = false;
  }
  controls();
  await Promise.all([drawHeads(), drawLarge()]);
  keep();
}
function step(dl, dh) {
  const V = view(), shownLayers = V.layers.map((_, l) => l).filter((l) => ofKind(V.layers[l]));
  const at = shownLayers.indexOf(S.l), l = shownLayers[Math.max(0, Math.min(shownLayers.length - 1, at + dl))];
  go({ l, h: Math.max(0, Math.min(V.layers[l].heads - 1, S.h + dh)) });
}
function token(d) {
  const list = S.side ? now.cols : now.rows, at = S.side ? S.k : S.q;
  holdAt(Math.max(0, Math.min(list.length - 1, at < 0 ? (d > 0 ? 0 : list.length - 1) : at + d)));
}
function holdAt(i) {
  S.lock = true;
  if (S.side) { S.k = i; S.q = -1; } else { S.q = i; S.k = -1; }
  point(); keep();
  const part = parts.find((p) => (S.side ? p.answers : p.asks)), span = part && part.spans.find(([j]) => j === i);
  if (span) span[1].scrollIntoView({ block: "nearest" });
}
function seek(onward) {
  const list = S.side ? now.cols : now.rows, text = S.find.toLowerCase();
  const hits = text ? list.map((g, i) => [g, i]).filter(([g]) => g.text.toLowerCase().includes(text)).map(([, i]) => i) : [];
  $("found").textContent = text ? hits.length + " found" : "";
  if (onward && hits.length) { const at = S.side ? S.k : S.q; holdAt(hits.find((i) => i > at) ?? hits[0]); }
  else if (now) shadeStrips();
}
function save(name, blob) {
  const a = document.createElement("a");
  a.href = URL.createObjectURL(blob); a.download = name;
  a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 10000);
}
const fileName = (end) => `${view().name}-layer-${layer().label}-head-${S.h}`.replace(/[^\w.-]+/g, "_") + end;
function toPng() {
  const map = $("map"), r = window.devicePixelRatio || 1, out = document.createElement("canvas");
  out.width = Math.max(map.width, 420 * r) + 24 * r; out.height = map.height + 60 * r;
  const c = out.getContext("2d");
  c.fillStyle = colour("--card"); c.fillRect(0, 0, out.width, out.height);
  c.fillStyle = colour("--ink"); c.font = 14 * r + "px " + FONT;
  c.fillText(`${view().name}: layer ${layer().label}, head ${S.h}`, 12 * r, 22 * r);
  c.fillStyle = colour("--soft"); c.font = 11 * r + "px " + FONT;
  c.fillText($("numbers").textContent, 12 * r, 40 * r);
  c.drawImage(map, 12 * r, 50 * r); c.drawImage($("cross"), 12 * r, 50 * r);
  out.toBlob((blob) => save(fileName(".png"), blob), "image/png");
}
const field = (x) => /[",\n\r]/.test(x) ? '"' + x.replace(/"/g, '""') + '"' : x;
function toCsv() {
  const lines = ["query,query token,key,key token,weight"], { mat, rows, cols } = now;
  for (let i = 0; i < mat.n; i++) for (let j = 0; j < mat.m; j++) {
    const x = mat.w[i * mat.m + j];
    if (x === x) lines.push([rows[i].at, field(rows[i].text), cols[j].at, field(cols[j].text), Number(x.toPrecision(6))].join(","));
  }
  save(fileName(".csv"), new Blob(["\ufeff" + lines.join("\r\n") + "\r\n"], { type: "text/csv" }));
}

function listen() {
  $("view").onchange = (e) => go({ v: Number(e.target.value) });
  $("kind").onchange = (e) => go({ kind: e.target.value });
  $("stat").onchange = (e) => go({ stat: e.target.value, min: 0 });
  $("sort").onchange = (e) => go({ sort: e.target.value, min: 0 });
  $("over").onchange = (e) => go({ over: e.target.value });
  $("shade").onchange = (e) => go({ shade: e.target.value });
  $("min").oninput = (e) => { S.min = Number(e.target.value); drawHeads(); keep(); };
  $("find").oninput = (e) => { S.find = e.target.value; seek(false); keep(); };
  $("find").onkeydown = (e) => { if (e.key === "Enter") seek(true); };
  for (const id of ["first", "merge", "dark", "side"]) $(id).onclick = () => go({ [id]: S[id] ? 0 : 1, ...(id === "side" ? { q: S.side ? S.k : -1, k: S.side ? -1 : S.q } : {}) });
  $("png").onclick = toPng; $("csv").onclick = toCsv;
  $("help").onclick = () => { $("keys").hidden = !$("keys").hidden; $("help").setAttribute("aria-pressed", !$("keys").hidden); };
  $("heads").onmousemove = (e) => { const c = cellAt(e); $("tip").textContent = c ? `layer ${view().layers[c.l].label}, head ${c.h}: ${statLine(c.l, c.h)}` : ""; };
  $("heads").onmouseleave = () => { $("tip").textContent = ""; };
  $("heads").onclick = (e) => { const c = cellAt(e); if (c) go({ l: c.l, h: c.h }); };
  const cross = $("cross");
  cross.onmousemove = (e) => { const at = spot(e); if (!at) return leave(); if (!S.lock) { [S.q, S.k] = at; point(); } };
  cross.onmouseleave = () => { if (!S.lock) leave(); };
  cross.onclick = (e) => { const at = spot(e); if (at) { [S.q, S.k] = at; S.lock = true; point(); keep(); } };
  document.onkeydown = (e) => {
    if (e.key === "Escape") { document.activeElement.blur(); return unlock(); }
    if (e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|SELECT)$/.test(e.target.tagName)) return;
    const acts = { ArrowLeft: () => step(0, -1), ArrowRight: () => step(0, 1), ArrowUp: () => step(-1, 0), ArrowDown: () => step(1, 0), ",": () => token(-1), ".": () => token(1),
      h: () => $("first").click(), m: () => $("merge").click(), d: () => $("dark").click(), r: () => $("side").click(), "?": () => $("help").click(), "/": () => $("find").focus() };
    if (acts[e.key]) { e.preventDefault(); acts[e.key](); }
  };
  let wait = 0;
  window.onresize = () => { clearTimeout(wait); wait = setTimeout(() => go({}), 80); };
  window.onhashchange = () => { restore(); go({}); };
}

async function start() {
  S.dark = START.dark = window.matchMedia("(prefers-color-scheme: dark)").matches ? 1 : 0;
  restore(); listen();
  await go({});
  if (S.find) seek(false);
}
const ready = new Promise((done) => document.addEventListener("DOMContentLoaded", () => start().then(done)));
// For scripts that look: the numbers that are drawn, read only.
window.attnlibLook = Object.freeze({
  ready,
  value: async (v, l, h, i, j) => { const x = await head(v, l, h); return x.w[i * x.m + j]; },
  rest: async (v, l, h, i) => { const x = await head(v, l, h); return x.rest ? x.rest[i] : 0; },
  state: () => ({ ...S }),
  order: () => cells.map((c) => [c.l, c.h]),
  box: (i, j) => now && { x: now.margin + (j + 0.5) * now.cell, y: now.margin + (i + 0.5) * now.cell },
  cell: (l, h) => { const c = cells.find((c) => c.l === l && c.h === h); return c && { x: c.x + c.s / 2, y: c.y + c.s / 2 }; },
});
})();
