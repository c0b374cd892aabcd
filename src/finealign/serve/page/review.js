// The page of `finealign review`: shows one image at a time and sends the person's answer before it shows the next.

const FOUND = 8; // classes that a search lists
const RETRY = 1500; // milliseconds until a server that did not answer is asked again
const WAIT = 3000; // milliseconds until it is asked again whether another window has left an image

const byId = (id) => document.getElementById(id);
const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
const percent = (value) => `${(100 * value).toFixed(0)}%`;
const points = (value) => `${value < 0 ? "−" : "+"}${Math.abs(100 * value).toFixed(1)}`;
const folded = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase().replace(/[_-]/g, " ");

// Of this page alone: a tab that is duplicated is another window.
const me = [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

let classes = [];
let state = null; // what the server last told
let busy = true; // whether an answer is on its way
let active = -1; // of the classes found, the one that Enter takes
let again = null; // the timer of the next try

/** An element with attributes and what is inside; what comes from outside becomes text, never markup. */
function make(tag, attributes = {}, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...inside);
  return element;
}

// --- asking the server -----------------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(message, kind) {
    super(message);
    this.kind = kind;
  }
}

async function ask(path, more = {}) {
  const body = JSON.stringify({ window: me, show: byId("show").checked, ...more });
  const response = await fetch(path, { method: "POST", body, headers: { "Content-Type": "application/json" } });
  const told = await response.json();
  if (!response.ok) throw new Refused(told.error, told.kind);
  return told;
}

/** Do one thing at a time; say what went wrong, and go on by itself where the server comes back. */
async function work(request, done) {
  clearTimeout(again);
  setBusy(true);
  try {
    const told = await request();
    problem("");
    done(told);
  } catch (error) {
    if (error instanceof Refused) {
      problem(error.message);
      if (error.kind === "answered") again = setTimeout(next, 0, error.message);
    } else {
      problem(
        "The server does not answer. Your answers so far are kept. Start it again by the same command: this page goes on by itself.",
      );
      again = setTimeout(next, RETRY);
    }
  } finally {
    setBusy(false);
  }
}

function setBusy(is) {
  busy = is;
  document.querySelector("main").setAttribute("aria-busy", String(is));
}

function next(message = "") {
  return work(
    async () => {
      if (!classes.length) classes = await (await fetch("/classes")).json();
      return ask("/next");
    },
    (told) => {
      show(told);
      problem(message);
    },
  );
}

function answer(label) {
  if (busy || !state?.image) return;
  const { number } = state.image;
  work(
    () => ask("/answer", { number, label }),
    (told) => {
      const { adapted, start } = told.answered;
      last(`You said: ${told.answered.label}. The adapted model says: ${adapted}. The model before adaptation: ${start}.`);
      show(told);
    },
  );
}

function undo() {
  if (busy || !state?.can_undo) return;
  work(
    () => ask("/undo"),
    (told) => {
      last(`Taken back: ${told.undone}. The image is shown again.`);
      show(told);
    },
  );
}

// --- showing ---------------------------------------------------------------------------------------------------------

function problem(text) {
  byId("problem").hidden = !text;
  if (byId("problem").textContent !== text) byId("problem").textContent = text;
}

const last = (text) => {
  byId("last").textContent = text;
};

function show(told) {
  const before = state?.image?.number;
  state = told;
  const { image } = told;
  byId("asking").hidden = !image;
  byId("end").hidden = !!image;
  byId("undo").disabled = !told.can_undo;
  byId("progress").max = told.target + told.to_learn || 1;
  byId("progress").value = told.labelled + told.learned;
  byId("status").textContent = far(told);
  figures(told.figures);
  if (!image) {
    ended(told);
    return;
  }
  models(image.models);
  if (image.number === before) return;
  byId("title").textContent =
    image.why === "learning"
      ? `Image ${told.learned + 1} of ${told.to_learn} to learn from`
      : `Image ${told.labelled + told.cannot_tell + 1}`;
  byId("name").textContent = image.name;
  byId("unreadable").hidden = true;
  byId("image").hidden = false;
  byId("image").src = `/image/${image.number}`;
  byId("choices").replaceChildren(
    ...image.choices.map((label, place) => {
      const button = make("button", { type: "button" }, make("kbd", {}, String(place + 1)), make("bdi", {}, label));
      button.addEventListener("click", () => answer(label));
      return make("li", {}, button);
    }),
  );
  byId("search-part").hidden = image.choices.length === classes.length;
  clearSearch();
  byId("title").focus({ preventScroll: true });
  if (byId("asking").getBoundingClientRect().top < 0) byId("asking").scrollIntoView();
}

function far({ labelled, target, cannot_tell: skipped, learned, to_learn: toLearn }) {
  const parts = [`${labelled} of ${target} labelled`];
  if (toLearn) parts.push(`${learned} of ${toLearn} to learn from`);
  if (skipped) parts.push(`${count(skipped, "image")} you could not tell`);
  return `${parts.join(", ")}.`;
}

function ended(told) {
  byId("end-title").textContent = told.done ? "Done" : "Nothing left for this window";
  byId("end-text").textContent = told.done
    ? "Every image has its label. Close this page and stop the command with Ctrl-C: it then says what was measured. With a larger --budget the same command goes on."
    : told.held
      ? `Another window has ${told.held === 1 ? "the last image" : `the last ${told.held} images`}. Answer there, or close it.`
      : "There are no further images.";
  byId("end-title").focus({ preventScroll: true });
  if (!told.done && told.held) again = setTimeout(next, WAIT);
}

function models(told) {
  byId("models").hidden = !told;
  if (told) byId("models").textContent = `The adapted model says: ${told.adapted}. The model before adaptation: ${told.start}.`;
}

function figures({ labels, next_look: look, none, adapted, start, difference }) {
  const rows = [];
  const row = (title, found, shown) => {
    if (!found) return;
    const value = `${shown(found.value)}, between ${shown(found.low)} and ${shown(found.high)}`;
    rows.push(make("dt", {}, title), make("dd", {}, value));
  };
  row("The adapted model is right in", adapted, percent);
  row("The model before adaptation in", start, percent);
  row("Difference in points", difference, points);
  const later = look ? `${rows.length ? "New" : "The first"} figures come with ${look} labels.` : "";
  const text = rows.length ? `From ${count(labels, "label")}. ${later}` : `Too early to say. ${later}`;
  const strangers = none ? ` ${count(none, "image")} so far showed none of the classes.` : "";
  const inside = [make("p", {}, text + strangers)];
  if (rows.length) inside.push(make("dl", { class: "figure" }, ...rows));
  const written = inside.map((part) => part.textContent).join();
  if (byId("figures").dataset.written === written) return; // else it would be read out after every answer
  byId("figures").dataset.written = written;
  byId("figures").replaceChildren(...inside);
}

// --- searching -------------------------------------------------------------------------------------------------------

function search() {
  const wanted = folded(byId("search").value.trim());
  const ranked = wanted
    ? classes
        .map((label) => [folded(label).indexOf(wanted), label])
        .filter(([place]) => place >= 0)
        .sort(([one], [other]) => Math.min(one, 1) - Math.min(other, 1))
        .slice(0, FOUND)
    : [];
  byId("found").replaceChildren(
    ...ranked.map(([, label], place) => {
      const option = make("li", { role: "option", id: `found-${place}`, "aria-selected": "false" }, label);
      option.addEventListener("pointerdown", (event) => event.preventDefault()); // the field keeps the focus
      option.addEventListener("click", () => answer(label));
      return option;
    }),
  );
  byId("found").hidden = !ranked.length;
  byId("no-match").hidden = !wanted || ranked.length > 0;
  byId("search").setAttribute("aria-expanded", String(ranked.length > 0));
  activate(ranked.length ? 0 : -1);
}

function activate(place) {
  const options = [...byId("found").children];
  active = place;
  options.forEach((option, number) => option.setAttribute("aria-selected", String(number === place)));
  if (options[place]) byId("search").setAttribute("aria-activedescendant", options[place].id);
  else byId("search").removeAttribute("aria-activedescendant");
}

function clearSearch() {
  byId("search").value = "";
  search();
}

function searchKey(event) {
  const options = byId("found").children.length;
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    if (options) activate((active + (event.key === "ArrowDown" ? 1 : options - 1)) % options);
  } else if (event.key === "Enter") {
    if (active >= 0) answer(byId("found").children[active].textContent);
  } else if (event.key === "Escape") {
    clearSearch();
    byId("title").focus({ preventScroll: true });
  } else {
    return;
  }
  event.preventDefault();
}

// --- the page --------------------------------------------------------------------------------------------------------

function key(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing) return;
  if (event.target === byId("search")) {
    searchKey(event);
    return;
  }
  if (!byId("keys").checked || event.repeat) return;
  if (event.key === "Backspace") undo();
  else if (event.key === "0") answer(byId("none").dataset.label);
  else if (event.key === "?") answer(byId("cannot").dataset.label);
  else if (/^[1-9]$/.test(event.key)) {
    const label = state?.image?.choices[Number(event.key) - 1];
    if (label !== undefined) answer(label);
  } else if (/^(\p{L}|\/)$/u.test(event.key) && state?.image && !byId("search-part").hidden) {
    byId("search").focus();
    if (event.key !== "/") return; // the letter itself goes into the field
  } else return;
  event.preventDefault();
}

function begin() {
  document.addEventListener("keydown", key);
  byId("search").addEventListener("input", search);
  for (const id of ["none", "cannot"]) byId(id).addEventListener("click", () => answer(byId(id).dataset.label));
  byId("undo").addEventListener("click", undo);
  byId("show").addEventListener("change", () => state?.image && next());
  byId("image").addEventListener("error", () => {
    byId("image").hidden = true;
    byId("unreadable").hidden = false;
    byId("unreadable").textContent = "This image cannot be shown. Answer that you cannot tell, to go on.";
  });
  window.addEventListener("pagehide", () => navigator.sendBeacon("/leave", JSON.stringify({ window: me })));
  window.addEventListener("pageshow", (event) => event.persisted && next());
  next();
}

begin();
