// The image with the boxes of all answers, and the list of answers beside it. The server sends
// {image: {url, width, height, frame, study, sr}, answers: [...], study, keep, only, note, file}, each of which may be
// missing; everything else happens here.
const COLOURS = ["#e69f00", "#56b4e9", "#2fbf8f", "#f0e442", "#4f8fe0", "#e8743b", "#cc79a7", "#b8b8b8"];
const NOTICE = "Research use only, not a medical device.";
const SVG = "http://www.w3.org/2000/svg";
const find = (selector) => element.querySelector(selector);
const stage = find(".stage"), svg = find("svg"), rows = find(".rows"), hint = find(".hint");
const state = { image: null, answers: [], view: null, drawing: false, threshold: 0.5, width: 100, level: 50, invert: false };
let gesture = null;
const filterId = "greys-" + Math.random().toString(36).slice(2);
find("filter").id = filterId;

const make = (name, attributes, parent) => {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.appendChild(node);
  return node;
};
const tag = (name, className, text, parent) => {
  const node = document.createElement(name);
  node.className = className;
  node.textContent = text;  // never HTML: prompts and sentences are other people's text
  parent.appendChild(node);
  return node;
};
const say = (text) => { hint.textContent = text; };
function setBusy(text) {
  stage.classList.toggle("busy", text !== null);
  stage.setAttribute("aria-busy", String(text !== null));
  if (text !== null) say(text);
}
find(".picture").parentElement.addEventListener("busy", (event) => setBusy(event.detail));  // the page has asked
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function receive(message) {
  if (!message || typeof message !== "object") return;
  if (message.study && (!state.image || message.study !== state.image.study)) return;  // about the image before this one
  setBusy(null);
  if (message.image) {
    state.image = message.image;
    state.answers = [];
    find("[data-do=sr]").hidden = !message.image.sr;
    showImage();
  }
  if (message.answers) {
    const start = message.keep ? state.answers : [];
    start.forEach((answer) => { answer.lit = false; if (message.only) answer.shown = false; });
    const fresh = message.answers.map((answer) => ({ ...answer, shown: true, lit: false }));
    state.answers = [...start, ...fresh].map((answer, index) => ({ ...answer, colour: COLOURS[index % COLOURS.length] }));
  }
  say(message.note || "");
  if (message.image || message.answers) { drawAnswers(); reveal(); }
  if (message.file) save(message.file.name, message.file.type, Uint8Array.from(atob(message.file.base64), (c) => c.charCodeAt(0)));
}

function reveal() {  // on a low or narrow window, the image is below what was clicked
  const { top, bottom, height } = stage.getBoundingClientRect();
  const seen = Math.min(bottom, window.innerHeight) - Math.max(top, 0);
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
  if (seen < 0.6 * Math.min(height, window.innerHeight)) find(".picture").scrollIntoView({ block: "start", behavior });
}

function showImage() {
  const { url, width, height, frame } = state.image;
  const film = find(".film");
  film.replaceChildren();
  make("image", { href: url, x: 0, y: 0, width, height, preserveAspectRatio: "none", filter: `url(#${filterId})` }, film);
  const edge = find(".frame");
  edge.replaceChildren();
  const [x0, y0, x1, y1] = frame;
  if (x0 > 0.5 || y0 > 0.5 || x1 < width - 0.5 || y1 < height - 0.5) {  // what the model did not see is darker
    make("path", { d: `M0 0H${width}V${height}H0ZM${x0} ${y0}V${y1}H${x1}V${y0}Z` }, edge);
  }
  stage.classList.add("ready");
  stage.setAttribute("aria-label", "Radiograph with the boxes of the answers. B draws a box, plus and minus zoom, arrows move.");
  fit();
}

function fit() {
  Object.assign(state, { width: 100, level: 50, invert: false });
  for (const name of ["width", "level"]) find(`[data-set=${name}]`).value = state[name];
  find("[data-do=invert]").setAttribute("aria-pressed", "false");
  greys();
  if (!state.image) return;
  const { width, height } = state.image, side = Math.max(width, height);
  setView({ x: (width - side) / 2, y: (height - side) / 2, side });
}

function setView(view) {
  state.view = view;
  svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.side} ${view.side}`);
  stage.classList.toggle("zoomed", view.side < Math.max(state.image.width, state.image.height));
  drawBoxes();
}

function zoom(factor, at) {
  if (!state.view) return;
  const { x, y, side } = state.view, whole = Math.max(state.image.width, state.image.height);
  const next = clamp(side * factor, whole / 16, whole);
  const centre = at || { x: x + side / 2, y: y + side / 2 };
  setView(inside({ x: centre.x - (centre.x - x) * next / side, y: centre.y - (centre.y - y) * next / side, side: next }));
}

function inside(view) {
  const { width, height } = state.image, whole = Math.max(width, height);
  const low = { x: (width - whole) / 2, y: (height - whole) / 2 };
  return { ...view, x: clamp(view.x, low.x, low.x + whole - view.side), y: clamp(view.y, low.y, low.y + whole - view.side) };
}

function greys() {  // window and level as in a viewer of radiographs: a linear map, clipped to black and white
  const width = state.width / 100, low = state.level / 100 - width / 2, sign = state.invert ? -1 : 1;
  const slope = sign / width, intercept = state.invert ? 1 + low / width : -low / width;
  for (const channel of element.querySelectorAll("feFuncR, feFuncG, feFuncB")) {
    channel.setAttribute("slope", slope);
    channel.setAttribute("intercept", intercept);
  }
}

const above = (answer) => answer.regions.filter((region) => region.score > state.threshold);

const ruler = document.createElement("canvas").getContext("2d");
ruler.font = "600 12px system-ui, sans-serif";

function drawBoxes() {
  const layer = find(".boxes"), view = state.view, taken = [];
  layer.replaceChildren();
  if (!view) return;
  const anyLit = state.answers.some((answer) => answer.lit);
  const pixel = view.side / (Math.min(svg.clientWidth, svg.clientHeight) || 500);  // image pixels for one of the screen
  // From the topmost down, so that its caption has the first choice of a place.
  const order = [...state.answers.keys()].sort((a, b) => state.answers[a].lit - state.answers[b].lit).reverse();
  for (const index of order) {
    const answer = state.answers[index];
    if (!answer.shown) continue;
    for (const region of answer.kind === "box" ? [{ box: answer.asked, score: 1 }] : above(answer)) {
      const [x0, y0, x1, y1] = region.box;
      const group = make("g", { class: answer.lit ? "lit" : anyLit ? "dim" : "", "data-index": index }, layer);
      layer.prepend(group);
      const box = make("rect", { x: x0, y: y0, width: Math.max(x1 - x0, 0), height: Math.max(y1 - y0, 0), stroke: answer.colour, fill: answer.colour }, group);
      if (answer.kind === "box") box.setAttribute("stroke-dasharray", "6 4");
      const caption = `${answer.kind === "box" ? "box" : answer.query} ${answer.kind === "box" ? "" : region.score.toFixed(2)}`.trim();
      group.addEventListener("click", () => { if (!state.drawing) light(index, true); });
      if (anyLit && !answer.lit) continue;
      const words = caption.length > 34 ? caption.slice(0, 33) + "…" : caption;
      const width = (ruler.measureText(words).width + 6) * pixel, height = 15 * pixel;
      const [x, y] = freePlace(region.box, width, height, taken);
      taken.push([x, y, width]);
      const text = make("text", { x: x + 3 * pixel, y: y + 11.5 * pixel, fill: answer.colour }, group);
      text.style.fontSize = `${12 * pixel}px`;
      text.style.strokeWidth = `${3 * pixel}px`;
      text.textContent = words;
    }
  }
}

function freePlace([x0, y0, x1, y1], width, height, taken) {  // at an edge of a box, where no caption is yet
  const { x: left, y: top, side } = state.view;
  const lines = [y0 - height, y1, ...Array.from({ length: 8 }, (_, step) => y0 + step * height), y1 - height];
  const places = lines.flatMap((y) => [[x0, y], [x1 - width, y]])
    .map(([x, y]) => [clamp(x, left, left + side - width), clamp(y, top, top + side - height)]);
  const meets = ([x, y]) => taken.some((other) => x < other[0] + other[2] && other[0] < x + width && Math.abs(y - other[1]) < height);
  return places.find((place) => !meets(place)) || places[0];
}

function light(index, scroll) {
  state.answers.forEach((answer, other) => { answer.lit = other === index ? !answer.lit : false; });
  if (state.answers[index].lit) state.answers[index].shown = true;
  refresh();
  if (scroll) rows.children[index].scrollIntoView({ block: "nearest" });
}

function refresh() {  // what changes without the rows being made again, so that focus and edits stay
  state.answers.forEach((answer, index) => {
    const row = rows.children[index], found = answer.kind === "box" || above(answer).length > 0;
    row.classList.toggle("lit", answer.lit);
    row.classList.toggle("absent", !found);
    row.setAttribute("aria-current", String(answer.lit));
    row.querySelector("input").checked = answer.shown;
    const count = above(answer).length;
    row.querySelector(".about").textContent = answer.kind === "box"
      ? `box ${answer.asked.map(Math.round).join(", ")}`
      : found ? `${count} ${count === 1 ? "region" : "regions"}: ${above(answer).map((region) => region.score.toFixed(2)).join(", ")}` : "not found above this score; the sentence is about wherever the model looked";
  });
  compare();
  drawBoxes();
}

function drawAnswers() {
  rows.replaceChildren();
  state.answers.forEach((answer, index) => {
    const row = document.createElement("div");
    row.className = "row";
    row.tabIndex = 0;
    row.setAttribute("role", "listitem");
    row.style.setProperty("--row-colour", answer.colour);
    const box = document.createElement("input");
    box.type = "checkbox";
    box.setAttribute("aria-label", `Show boxes of ${answer.query}`);
    box.addEventListener("click", (event) => event.stopPropagation());
    box.addEventListener("change", () => { answer.shown = box.checked; answer.lit = answer.lit && answer.shown; refresh(); });
    row.appendChild(box);
    tag("span", "query", answer.kind === "box" ? "What is in this box?" : answer.query, row);
    tag("span", "score", answer.kind === "box" ? "" : answer.score.toFixed(2), row).title = "Score of the prompt as a whole; each region has its own";
    tag("span", "about", "", row);
    if (answer.sentence !== null && answer.sentence !== undefined) {
      const sentence = tag("span", "sentence", answer.sentence, row);
      if (answer.report) {
        try { sentence.contentEditable = "plaintext-only"; } catch { sentence.contentEditable = "true"; }
        sentence.setAttribute("role", "textbox");
        sentence.setAttribute("aria-label", `Sentence about ${answer.query}`);
        sentence.addEventListener("input", () => { answer.sentence = sentence.textContent; answer.edited = true; });
        sentence.addEventListener("keydown", (event) => event.stopPropagation());
        sentence.addEventListener("click", (event) => event.stopPropagation());
        sentence.addEventListener("focus", () => { if (!answer.lit) light(index); });
      }
    }
    row.addEventListener("click", () => light(index));
    row.addEventListener("keydown", (event) => {
      if (event.target !== row) return;  // Space on the check mark is its own
      const next = { ArrowDown: index + 1, ArrowUp: index - 1 }[event.key];
      if (next !== undefined && rows.children[next]) { rows.children[next].focus(); event.preventDefault(); }
      if (event.key === "Enter" || event.key === " ") { light(index); event.preventDefault(); }
    });
    rows.appendChild(row);
  });
  refresh();
}

function overlap(first, second) {  // IoU of the unions of two answers' boxes, on a grid
  const size = 256, { width, height } = state.image;
  const cover = (answer) => {
    const cells = new Uint8Array(size * size);
    for (const { box } of answer.kind === "box" ? [{ box: answer.asked }] : above(answer)) {
      const [x0, y0, x1, y1] = box.map((edge, i) => Math.round(clamp(edge / (i % 2 ? height : width), 0, 1) * size));
      for (let y = y0; y < y1; y++) cells.fill(1, y * size + x0, y * size + x1);
    }
    return cells;
  };
  const a = cover(first), b = cover(second);
  let both = 0, any = 0;
  for (let i = 0; i < a.length; i++) { both += a[i] & b[i]; any += a[i] | b[i]; }
  return any ? both / any : null;
}

function compare() {
  const shown = state.answers.filter((answer) => answer.shown), line = find(".comparison");
  line.textContent = "";
  if (shown.length !== 2 || !state.image) return;
  const iou = overlap(...shown);
  const parts = [iou === null ? "no boxes to compare" : `overlap of their boxes (IoU) ${iou.toFixed(2)}`];
  if (shown.every((answer) => answer.kind !== "box")) parts.push(`scores ${shown.map((answer) => answer.score.toFixed(2)).join(" and ")}`);
  line.textContent = `Two shown: ${parts.join(", ")}.`;
}

function setDrawing(on) {
  state.drawing = on;
  stage.classList.toggle("draws", on);
  find("[data-do=draw]").setAttribute("aria-pressed", String(on));
  say(on ? "Drag over a region of the image; Escape cancels." : "");
}

const place = (event) => {
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  return { x: point.x, y: point.y };
};

svg.addEventListener("pointerdown", (event) => {
  if (!state.view || event.button !== 0) return;
  const start = place(event);
  gesture = { start, view: state.view, moved: false };
  gesture.from = [event.clientX, event.clientY];
});
svg.addEventListener("pointermove", (event) => {
  if (!gesture) return;
  const now = place(event);
  if (!gesture.moved) {  // a click that trembles is still one; captured, it would not reach the box beneath
    if (Math.hypot(event.clientX - gesture.from[0], event.clientY - gesture.from[1]) < 4) return;
    gesture.moved = true;
    if (state.drawing || stage.classList.contains("zoomed")) svg.setPointerCapture(event.pointerId);
  }
  if (state.drawing) {
    const { width, height } = state.image;
    const xs = [gesture.start.x, now.x].map((v) => clamp(v, 0, width)).sort((a, b) => a - b);
    const ys = [gesture.start.y, now.y].map((v) => clamp(v, 0, height)).sort((a, b) => a - b);
    gesture.box = [xs[0], ys[0], xs[1], ys[1]];
    const layer = find(".drawing");
    layer.replaceChildren();
    make("rect", { x: xs[0], y: ys[0], width: xs[1] - xs[0], height: ys[1] - ys[0], stroke: "#fff", fill: "#fff", "stroke-dasharray": "6 4" }, layer);
  } else {
    setView(inside({ ...state.view, x: state.view.x + gesture.start.x - now.x, y: state.view.y + gesture.start.y - now.y }));
  }
});
const end = (event) => {
  if (!gesture) return;
  const { box } = gesture;
  gesture = null;
  find(".drawing").replaceChildren();
  if (!state.drawing || event.type === "pointercancel") return;
  const pixel = state.view.side / Math.min(svg.clientWidth, svg.clientHeight);
  if (!box || box[2] - box[0] < 4 * pixel || box[3] - box[1] < 4 * pixel) { say("That box is too small: drag from one corner to the other."); return; }
  setDrawing(false);
  ask(box);
};
svg.addEventListener("pointerup", end);
svg.addEventListener("pointercancel", end);
svg.addEventListener("wheel", (event) => {
  if (!state.view || (event.deltaY > 0 && !stage.classList.contains("zoomed"))) return;  // then the page scrolls
  event.preventDefault();
  zoom(event.deltaY > 0 ? 1.15 : 1 / 1.15, place(event));
}, { passive: false });

function ask(box) {
  setBusy("Asking…");
  trigger("ask_box", { box: box.map((edge) => Math.round(edge * 100) / 100) });
}

const actions = {
  draw: () => { if (state.image) setDrawing(!state.drawing); else say("Choose an image first."); },
  in: () => zoom(1 / 1.4),
  out: () => zoom(1.4),
  fit,
  invert: (button) => { state.invert = !state.invert; button.setAttribute("aria-pressed", String(state.invert)); greys(); },
  all: () => { state.answers.forEach((answer) => { answer.shown = true; answer.lit = false; }); refresh(); },
  clear: () => { state.answers = []; drawAnswers(); },
  text: () => (sentences().length ? save("report.txt", "text/plain", `${[...sentences(), "", NOTICE].join("\n")}\n`) : say("No sentence is shown that could be saved.")),
  json: () => save("answers.json", "application/json", JSON.stringify(exported(), null, 2) + "\n"),
  png: picture,
  sr: () => {
    if (!visible().length) { say("There is nothing to save yet."); return; }
    setBusy("Writing the structured report…");
    trigger("save_sr", { result: exported() });
  },
};
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-do]");
  if (button && element.contains(button)) actions[button.dataset.do](button);
});
element.addEventListener("input", (event) => {
  const name = event.target.dataset && event.target.dataset.set;
  if (!name) return;
  state[name] = Number(event.target.value);
  if (name === "threshold") { find("output").textContent = state.threshold.toFixed(2); refresh(); } else greys();
});
stage.addEventListener("keydown", (event) => {
  const step = state.view ? state.view.side / 10 : 0;
  const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
  const keys = { b: "draw", "+": "in", "=": "in", "-": "out", 0: "fit", i: "invert" };
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (moves[event.key] && state.view) {
    const [dx, dy] = moves[event.key];
    setView(inside({ ...state.view, x: state.view.x + dx, y: state.view.y + dy }));
    event.preventDefault();
  } else if (event.key === "Escape") { gesture = null; find(".drawing").replaceChildren(); setDrawing(false); }
  else if (keys[event.key.toLowerCase()]) { find(`[data-do=${keys[event.key.toLowerCase()]}]`).click(); event.preventDefault(); }
});

const visible = () => state.answers.filter((answer) => answer.shown);
const sentences = () => visible().filter((a) => a.sentence && (a.kind === "box" || a.report || above(a).length)).map((a) => a.sentence);
function exported() {
  const { width, height, frame } = state.image || {};
  return {
    notice: NOTICE,
    image: { width, height, frame }, threshold: state.threshold,
    answers: visible().map(({ query, kind, score, sentence, asked, edited, report, ...rest }) => ({
      query, kind, score, sentence, box: asked || null, edited: Boolean(edited), of_report: Boolean(report),
      regions: kind === "box" ? rest.regions : above(rest), prompt_type: rest.prompt_type || null,
    })),
  };
}
function save(name, type, content) {
  if (!visible().length) { say("There is nothing to save yet."); return; }
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  say(`${name} was saved.`);
}
async function picture() {  // the whole image with its boxes, sentences below
  if (!state.image) { say("There is nothing to save yet."); return; }
  const { width, height, url } = state.image, scale = Math.max(1, 1024 / Math.max(width, height));
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d"), lines = [];
  const W = Math.round(width * scale), H = Math.round(height * scale);
  context.font = "16px system-ui, sans-serif";
  for (const answer of visible()) {
    if (answer.kind !== "box" && !answer.report && !above(answer).length) continue;
    const name = answer.kind === "box" ? "Box" : `${answer.query} (${answer.score.toFixed(2)})`;
    let line = "";
    for (const word of `${name}: ${answer.sentence || "found"}`.split(/\s+/)) {
      if (line && context.measureText(`${line} ${word}`).width > W - 30) { lines.push([line, answer.colour]); line = word; } else line = line ? `${line} ${word}` : word;
    }
    lines.push([line, answer.colour]);
  }
  canvas.width = W;
  canvas.height = H + (lines.length + 1) * 24 + 16;
  context.fillStyle = "#111";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(image, 0, 0, W, H);
  context.lineWidth = 3;
  context.font = "16px system-ui, sans-serif";
  for (const answer of visible()) {
    for (const { box } of answer.kind === "box" ? [{ box: answer.asked }] : above(answer)) {
      context.strokeStyle = answer.colour;
      context.setLineDash(answer.kind === "box" ? [8, 6] : []);
      context.strokeRect(box[0] * scale, box[1] * scale, (box[2] - box[0]) * scale, (box[3] - box[1]) * scale);
    }
  }
  lines.forEach(([line, colour], index) => { context.fillStyle = colour; context.fillText(line, 15, H + 26 + index * 24); });
  context.fillStyle = "#999";
  context.fillText(NOTICE, 15, H + 26 + lines.length * 24);
  canvas.toBlob((blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = "explained.png";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say("explained.png was saved.");
  });
}

// What the server would refuse without a word is not sent to it.
function refuse(event, files) {
  const file = [...(files || [])].find((each) => each.size > props.max_upload);
  if (!file) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  if (event.type === "change") event.target.value = "";
  trigger("refuse", { name: file.name, bytes: file.size });
}
const inUpload = (event) => event.target instanceof Element && event.target.closest("#upload");
document.addEventListener("change", (event) => { if (inUpload(event)) refuse(event, event.target.files); }, true);
document.addEventListener("drop", (event) => { if (inUpload(event)) refuse(event, event.dataTransfer?.files); }, true);

new ResizeObserver(drawBoxes).observe(svg);
greys();
watch("value", () => receive(props.value));
receive(props.value);
