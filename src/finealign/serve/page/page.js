// The page of `finealign serve`: sends images to /predict, a few at a time, and shows what comes back.

const AT_ONCE = 4; // requests under way
const CARDS = 200; // images shown in full
const ROWS = 500; // rows of the table added at a time
const RETRIES = 30; // of one image while the server is full
const TOP = 10; // classes shown at most
const TOLD = 1000; // milliseconds between two messages to a screen reader
const PREVIEW = 480; // pixels of a preview's width
const KINDS = 6; // of left out files that are named
const NOTABLE = 0.5; // from which an image seems to show none of the classes
const IMAGE =
  /\.(jpe?g|jpe|jfif|jif|mpo|a?png|webp|gif|bmp|dib|tiff?|avifs?|hei[cf]|hif|jp2|j2k|j2c|jpc|jpf|jpx|p[pgbn]m)$/i;
// How files of images begin that have no such ending, as latin-1.
const MAGIC = /^(\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|BM|II\*\0|MM\0\*|\xff\x4f\xff\x51|\0\0\0\x0cj[PX]|....ftyp(av|he|mi|ms)|P[1-6]\s)/s;
const FOREIGN = /^(@eadir|[#@]recycle|\$recycle\.bin|recycler|#snapshot|lost\+found|__macosx|\..*)$/i; // no photos of the user
const FORMULA = /^[=+\-@\t\r]/; // what a spreadsheet would compute
const SCORES = {
  global: "global: the whole image",
  las: "las: crops",
  fused: "fused: both",
};

// The server's address of something, whatever path a proxy has the server under.
const at = (name) => new URL(name, import.meta.url);
const byId = (id) => document.getElementById(id);
const percent = (value) => `${(100 * value).toFixed(1)}%`;
const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

let items = []; // {name, file, top, score, state, found, error, card, row}; state: waiting, done, failed or stopped
let leftOut = new Map(); // how many files of folders by kind
let next = 0; // the first that has not been sent
let under = 0; // requests under way
let stopping = new AbortController();
let rowsShown = 0;
let pasted = 0;
let telling = null;
let model = null;

/** An element with attributes and what is inside; what comes from outside becomes text, never markup. */
function make(tag, attributes = {}, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...inside);
  return element;
}

// --- taking images ---------------------------------------------------------------------------------------------------

/** Take files as {name, file}, without a file where it could not be opened; they are sent by the settings of this moment. */
function add(named) {
  if (!model) return;
  if (!named.length) {
    byId("status").textContent = `There was no image among them.${told()}`;
    return;
  }
  if (stopping.signal.aborted) stopping = new AbortController();
  const top = byId("top").value;
  const score = byId("score").value;
  for (const { name, file } of named) {
    const item = { name, file, top, score, state: "waiting", found: null, error: null, card: null, row: null };
    if (items.length < CARDS) byId("cards").append(startCard(item));
    items.push(item);
  }
  addRows(ROWS);
  pump();
}

/** Of a folder's files those that are images, by their ending or else by how they begin; the others are counted. */
async function images(named) {
  const kept = [];
  for (const one of named) {
    const steps = one.name.split("/");
    const name = steps.pop();
    if (name.startsWith(".") || steps.slice(1).some((step) => FOREIGN.test(step))) leave("hidden or a system's own");
    else if (!one.file || IMAGE.test(name) || MAGIC.test(await beginning(one.file))) kept.push(one);
    else leave(/.(\.[^.]+)$/.exec(name)?.[1].toLowerCase() ?? "without an ending");
  }
  return kept;
}

const leave = (kind) => leftOut.set(kind, (leftOut.get(kind) ?? 0) + 1);

async function beginning(file) {
  try {
    return String.fromCharCode(...new Uint8Array(await file.slice(0, 32).arrayBuffer()));
  } catch {
    return "";
  }
}

/** Every file below what was dropped, a folder's images alone; what cannot be opened is among them without a file. */
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return [...transfer.files].map((file) => ({ name: file.name, file }));
  const found = [];
  const inside = [];
  const visit = async (entry, inFolder) => {
    const name = entry.fullPath.replace(/^\//, "");
    try {
      if (entry.isDirectory) {
        for (const inner of await listed(entry.createReader())) await visit(inner, true);
      } else {
        const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
        (inFolder ? inside : found).push({ name, file });
      }
    } catch {
      found.push({ name, file: null });
    }
  };
  for (const entry of entries) await visit(entry, false);
  found.push(...(await images(inside)));
  return found.sort((one, other) => (one.name < other.name ? -1 : 1));
}

/** All entries of a folder, which its reader gives some at a time. */
async function listed(reader) {
  const all = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return all;
    all.push(...some);
  }
}

// --- asking the server -----------------------------------------------------------------------------------------------

function pump() {
  while (under < AT_ONCE && next < items.length) {
    const item = items[next++];
    under += 1;
    ask(item, stopping.signal);
  }
  tell();
}

async function ask(item, signal) {
  const ours = items;
  try {
    item.found = await predict(item, signal);
    item.state = "done";
  } catch (error) {
    item.state = signal.aborted ? "stopped" : "failed";
    item.error = signal.aborted ? "Stopped before it was answered." : error.message;
  }
  if (ours !== items) return; // cleared meanwhile
  under -= 1;
  show(item);
  item.file = null;
  pump();
}

/** What the server makes of an image; while it is full, ask again. */
async function predict(item, signal) {
  if (!item.file) throw new Error("The browser cannot open it.");
  const limit = model.limits.max_upload_bytes;
  if (item.file.size > limit) {
    const most = `${Number((limit / 1e6).toPrecision(3))} MB`;
    throw new Error(`The file is over the limit of ${most}. The server takes larger ones with a larger --max-upload-mb.`);
  }
  for (let tries = 0; ; tries += 1) {
    const body = new FormData();
    body.append("file", item.file, "image"); // the server has no use for a name
    const query = new URLSearchParams({ top_k: item.top, score: item.score });
    let response;
    try {
      response = await fetch(at(`predict?${query}`), { method: "POST", body, signal });
    } catch {
      throw new Error("The server did not answer. Is it still running?");
    }
    if (response.status === 503 && tries < RETRIES) {
      await pause(Number(response.headers.get("Retry-After")) || 1);
      signal.throwIfAborted();
      continue;
    }
    const answer = await response.json().catch(() => null);
    if (!answer) throw new Error(foreign(response.status));
    if (!response.ok) throw new Error(answer.error);
    return answer;
  }
}

/** Why there is no answer of the server's own: whatever lies before it has answered. */
function foreign(status) {
  if (status === 413) return "A proxy before the server takes no file of this size (413); nginx: client_max_body_size.";
  return `Not the server but something before it, as a proxy, has answered (${status}).`;
}

function stop() {
  stopping.abort();
  for (const item of items.slice(next)) {
    item.state = "stopped";
    item.error = "Stopped before it was sent.";
    item.file = null;
    show(item);
  }
  next = items.length;
  tell();
}

function clear() {
  stopping.abort();
  items = [];
  leftOut = new Map();
  next = under = rowsShown = 0;
  byId("cards").replaceChildren();
  byId("rows").replaceChildren();
  byId("explanation").hidden = true;
  addRows(0);
  tell();
  byId("files").focus();
}

// --- showing ---------------------------------------------------------------------------------------------------------

function startCard(item) {
  const title = make("h3", {}, make("bdi", {}, item.name));
  item.card = make("li", { class: "card" }, title, make("p", { class: "faint" }, "Waiting."));
  return item.card;
}

function show(item) {
  if (item.card) {
    const [title] = item.card.children;
    item.card.replaceChildren(title, ...(item.found ? result(item) : [make("p", { class: "failed" }, item.error)]));
    if (item.found) byId("explanation").hidden = false;
  }
  if (item.row) fillRow(item);
}

function result(item) {
  const { found } = item;
  const guesses = make("div", { class: "guesses" }, guess("Adapted", found, "bar"));
  if (found.start) guesses.append(guess("Start", found.start, "bar start"));
  return [seen(item), make("div", {}, verdict(found), ...stranger(found), guesses, crops(found))];
}

function verdict({ label, start }) {
  const name = make("strong", {}, make("bdi", {}, label));
  if (!start) return make("p", { class: "verdict" }, name);
  if (label === start.label) return make("p", { class: "verdict same" }, name, ": same label as the start");
  return make("p", { class: "verdict changed" }, name, ": label changed, it was ", make("bdi", {}, start.label));
}

/** A word of warning for an image that seems to show none of the classes. */
function stranger({ none }) {
  if (none === null || none < NOTABLE) return [];
  return [make("p", { class: "stranger" }, `It seems to show none of the classes: ${percent(none)}.`)];
}

function guess(title, { top }, kind) {
  const lines = top.map(({ label, confidence }) => {
    const filled = make("span");
    filled.style.setProperty("width", percent(confidence));
    const line = make("span", { class: "line" }, make("bdi", {}, label), make("span", { class: "number" }, percent(confidence)));
    return make("li", {}, line, make("span", { class: kind, "aria-hidden": "true" }, filled));
  });
  return make("div", {}, make("h4", {}, title), make("ol", {}, ...lines));
}

/** The image with its crops on it, in percent of its sides. */
function seen({ file, name, found }) {
  const { width, height } = found;
  const picture = make("div", { class: "seen" });
  picture.style.setProperty("--aspect", width / height);
  preview(file).then(
    (source) => {
      const image = make("img", { alt: `Preview of ${name}`, src: source });
      const done = () => URL.revokeObjectURL(source);
      image.addEventListener("load", done);
      image.addEventListener("error", done);
      picture.prepend(image);
    },
    () => picture.prepend(make("p", { class: "none faint" }, "This browser cannot show the image.")),
  );
  const largest = Math.max(...found.crops.map((crop) => crop.weight));
  for (const { box, weight } of found.crops) {
    const [left, top, right, bottom] = box;
    const crop = make("span", { class: "crop", "aria-hidden": "true" });
    crop.style.setProperty("left", percent(left / width));
    crop.style.setProperty("top", percent(top / height));
    crop.style.setProperty("width", percent((right - left) / width));
    crop.style.setProperty("height", percent((bottom - top) / height));
    crop.style.setProperty("--share", largest ? weight / largest : 0);
    picture.append(crop);
  }
  return picture;
}

/** The address of a small copy, so that hundreds of photos do not fill the memory. */
async function preview(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, PREVIEW / bitmap.width);
  const canvas = make("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/webp", 0.85));
  return URL.createObjectURL(blob);
}

function crops(found) {
  if (!found.crops.length) return make("p", { class: "faint" }, "This score looks at the image as a whole.");
  const sorted = [...found.crops].sort((one, other) => other.weight - one.weight);
  const lines = sorted.map(({ box: [left, top, right, bottom], weight }) =>
    make("li", {}, `${percent(weight)}: from ${left}, ${top} to ${right}, ${bottom}`),
  );
  const title = `${count(lines.length, "crop")} and how much each counts`;
  const unit = make("p", { class: "faint" }, `In pixels of the image, which is ${found.width} by ${found.height}.`);
  return make("details", {}, make("summary", {}, title), unit, make("ol", {}, ...lines));
}

/** As many more rows of the images that have no card. */
function addRows(most) {
  const before = rowsShown;
  const rest = Math.max(0, items.length - CARDS);
  const end = Math.min(rest, Math.max(rowsShown, most));
  const rows = items.slice(CARDS + rowsShown, CARDS + end).map((item) => {
    item.row = make("tr");
    fillRow(item);
    return item.row;
  });
  byId("rows").append(...rows);
  rowsShown = end;
  byId("more").hidden = !rest;
  const listing = end < rest ? `, ${end} of them so far` : "";
  byId("more-note").textContent =
    `The first ${CARDS} images are shown in full, the other ${rest} as rows${listing}. All are in the CSV.`;
  const button = byId("more-button");
  if (end === rest && document.activeElement === button) focusOn(byId("rows").children[before]);
  button.hidden = end === rest;
}

/** Go on from here by keyboard, instead of a button that has had its time. */
function focusOn(element) {
  element.tabIndex = -1;
  element.focus({ preventScroll: true });
}

function fillRow({ row, name, state, found, error }) {
  const cell = (guessed) => (guessed ? `${guessed.label}, ${percent(guessed.confidence)}` : "");
  const outcome = state === "waiting" ? "Waiting." : found ? cell(found) : error;
  row.className = found || state === "waiting" ? "" : "error";
  const title = make("th", { scope: "row" }, make("bdi", {}, name));
  row.replaceChildren(title, make("td", {}, outcome), make("td", {}, cell(found?.start)));
}

/** Bring buttons and the progress up to date now, and what is read out at most once a second. */
function tell() {
  const working = under > 0;
  const finished = items.filter((item) => item.state !== "waiting").length;
  const progress = byId("progress");
  progress.hidden = !items.length;
  progress.max = items.length || 1;
  progress.value = finished;
  if (!working && document.activeElement === byId("stop")) focusOn(byId("results"));
  byId("stop").disabled = !working;
  byId("clear").disabled = !items.length;
  byId("download").disabled = !finished;
  if (!working) {
    clearTimeout(telling);
    telling = null;
    byId("status").textContent = summary();
  } else if (telling === null) {
    byId("status").textContent = summary();
    telling = setTimeout(() => {
      telling = null;
      tell();
    }, TOLD);
  }
}

function summary() {
  if (!items.length) return "No images yet.";
  const of = (state) => items.filter((item) => item.state === state).length;
  const changed = items.filter(({ found }) => found?.start && found.label !== found.start.label).length;
  const parts = [`${of("done")} of ${count(items.length, "image")} done`];
  if (of("failed")) parts.push(`${of("failed")} failed`);
  if (of("stopped")) parts.push(`${of("stopped")} stopped`);
  if (changed) parts.push(`label changed in ${changed}`);
  return `${parts.join(", ")}.${told()}`;
}

/** What was left out of folders, as a sentence behind another. */
function told() {
  const kinds = [...leftOut].sort(([, one], [, other]) => other - one);
  const shown = kinds.slice(0, KINDS).map(([kind, number]) => `${number} ${kind}`);
  if (kinds.length > KINDS) shown.push(`${kinds.length - KINDS} more kinds`);
  return shown.length ? ` Left out as no images: ${shown.join(", ")}.` : "";
}

// --- the CSV ---------------------------------------------------------------------------------------------------------

/** A value as CSV; one that a spreadsheet would take for a formula gets an apostrophe before it. */
function quoted(value) {
  const text = typeof value === "string" && FORMULA.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** Every image, in the columns of `finealign predict` and, before the last, one for why there is no label. */
function csv() {
  const most = Math.max(1, ...items.map(({ found }) => found?.top.length ?? 1));
  const header = ["path", "label", "confidence"];
  for (let rank = 2; rank <= most; rank += 1) header.push(`label_${rank}`, `confidence_${rank}`);
  header.push("start_label", "start_confidence", "error", "none");
  const lines = items.map(({ name, found, error }) => {
    const line = [name];
    for (let rank = 0; rank < most; rank += 1) {
      const choice = found?.top[rank];
      line.push(choice?.label ?? "", choice?.confidence ?? "");
    }
    line.push(found?.start?.label ?? "", found?.start?.confidence ?? "");
    line.push(found ? "" : (error ?? "Not answered yet."), found?.none ?? "");
    return line;
  });
  return [header, ...lines].map((line) => `${line.map(quoted).join(",")}\n`).join("");
}

function download() {
  const source = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  make("a", { href: source, download: "predictions.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(source), 60_000);
}

// --- the page --------------------------------------------------------------------------------------------------------

function choose(input, named) {
  const files = [...input.files];
  input.value = ""; // so that the same can be chosen again
  add(files.map(named));
}

function listen() {
  byId("files").addEventListener("change", ({ target }) => choose(target, (file) => ({ name: file.name, file })));
  byId("folder").addEventListener("change", async ({ target }) => {
    const files = [...target.files].map((file) => ({ name: file.webkitRelativePath || file.name, file }));
    target.value = "";
    add(await images(files));
  });
  document.addEventListener("paste", ({ clipboardData }) => {
    add([...clipboardData.files].map((file) => ({ name: `pasted ${(pasted += 1)}`, file })));
  });
  const over = (is) => byId("drop").classList.toggle("over", is);
  document.addEventListener("dragover", (event) => {
    event.preventDefault(); // else the browser leaves the page for the file
    over(true);
  });
  document.addEventListener("dragleave", (event) => over(event.relatedTarget !== null));
  document.addEventListener("drop", async (event) => {
    event.preventDefault();
    over(false);
    add(await dropped(event.dataTransfer));
  });
  byId("download").addEventListener("click", download);
  byId("stop").addEventListener("click", stop);
  byId("clear").addEventListener("click", clear);
  byId("more-button").addEventListener("click", () => addRows(rowsShown + ROWS));
}

async function begin() {
  listen();
  try {
    model = await (await fetch(at("model"))).json();
  } catch {
    byId("status").textContent = "The server did not answer. Is it still running?";
    return;
  }
  byId("classes").append(...model.classes.map((name) => make("li", {}, make("bdi", {}, name))));
  for (let top = 1; top <= Math.min(TOP, model.classes.length); top += 1) byId("top").append(new Option(top, top));
  byId("top").value = Math.min(5, model.classes.length);
  byId("score").append(...model.scores.map((score) => new Option(SCORES[score] ?? score, score)));
  byId("score").value = model.score;
  byId("status").textContent = "Ready. No images yet.";
}

begin();
