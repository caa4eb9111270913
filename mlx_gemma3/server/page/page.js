// The page: the conversation that is shown, the answers that are being written, and what the buttons do.

import { Composer } from "./composer.js";
import { Conversations, titleOf } from "./conversations.js";
import { ask } from "./dialogs.js";
import { iconButton, make } from "./dom.js";
import { onDrop } from "./drop.js";
import { End } from "./end.js";
import { shown } from "./pictures.js";
import { asked, messagesOf } from "./request.js";
import * as settings from "./settings.js";
import { answer, key, Lost, models, Refused } from "./stream.js";
import { AnswerTurn, copied, saidTurn } from "./turns.js";

const SAVED_EACH = 1000; // milliseconds between two writes of an answer on its way: what a closed tab may lose

const [main, turns, titleLine, list, status, notice, latest] = [
  "main",
  "turns",
  "title",
  "list",
  "status",
  "notice",
  "latest",
].map((id) => document.getElementById(id));
const end = new End(document.getElementById("scroller"), latest);
const conversations = new Conversations();
const running = new Map(); // id of a conversation → its answer on its way: {stop, progress, turn}
let shownNow = conversations.create();
let views = []; // of the turns shown
let editor = null;
let served = []; // the server's models

const composer = new Composer(document.getElementById("foot"), {
  send: (turn) => {
    if (running.has(shownNow.id)) return;
    composer.clear();
    say(shownNow, turn);
  },
  stop: () => running.get(shownNow.id)?.stop.abort(),
  note,
});

// ---------------------------------------------------------------- asking

/** Say something at the end of a conversation, or in the place of the turn with this number, and have it answered. */
async function say(conversation, said, number = conversation.turns.length) {
  if (running.has(conversation.id)) return;
  conversation.turns.splice(number);
  conversation.turns.push({ role: "user", text: said.text, pictures: said.pictures });
  if (number === 0 && !conversation.named) conversation.title = titleOf(said);
  note("");
  editor = null;
  const answered = answerLast(conversation);
  toComposer();
  await answered;
}

async function retry(conversation) {
  if (running.has(conversation.id)) return;
  if (conversation.turns.at(-1)?.role === "assistant") conversation.turns.pop();
  const answered = answerLast(conversation);
  toComposer(); // the button that was pressed is gone
  await answered;
}

/** Write the answer to the last turn, to its end or to what kept it from there. */
async function answerLast(conversation) {
  const turn = { role: "assistant", text: "", thoughts: "", state: "writing", error: "", rate: null };
  const work = { stop: new AbortController(), progress: {}, turn };
  conversation.turns.push(turn);
  conversation.changed = Date.now();
  running.set(conversation.id, work);
  if (shownNow === conversation) {
    history.replaceState(null, "", `#${conversation.id}`);
    draw();
    end.go();
  }
  let saved = Date.now();
  try {
    await save(conversation);
    await drawList();
    const messages = await messagesOf(conversation.turns.slice(0, -1));
    await withKey(async () => {
      if (!served.length) await learnModels();
      for await (const event of answer(asked(settings.read(), served, messages), work.stop.signal)) {
        take(event, work);
        drawAnswer(conversation);
        if (Date.now() - saved > SAVED_EACH) {
          saved = Date.now();
          await save(conversation);
        }
      }
    });
  } catch (error) {
    if (error.name === "AbortError") turn.state = "stopped";
    else {
      turn.state = "failed";
      turn.error =
        error instanceof Lost || error instanceof Refused ? error.message : `The page failed: ${error.message}`;
      if (!(error instanceof Lost || error instanceof Refused)) console.error(error);
    }
  }
  await save(conversation); // what is shown as ended is there after a reload
  running.delete(conversation.id);
  await finished(conversation, turn);
}

function take(event, work) {
  if (event.kind === "progress") work.progress = event;
  if (event.kind === "thinking") work.turn.thoughts += event.text;
  if (event.kind === "text") work.turn.text += event.text;
  if (event.kind !== "end") return;
  work.turn.state = event.finish === "length" ? "length" : "done";
  work.turn.rate = event.timings?.predicted_per_second ?? null;
}

async function finished(conversation, turn) {
  if (shownNow === conversation) {
    views.at(-1)?.update(null);
    composer.setRunning(false);
    main.classList.remove("running");
    end.keep();
    const said = turn.text ? `Answer: ${views.at(-1)?.text.textContent}` : "Stopped";
    tell(turn.error ? `Error: ${turn.error}` : said);
  }
  await drawList();
}

/** Do something; where the server wants a key for it, ask for the key and do it again. */
async function withKey(work) {
  for (let said = "This server wants an access key."; ; said = "That key was not accepted.") {
    try {
      await work();
      return;
    } catch (error) {
      if (!(error instanceof Refused) || error.status !== 401 || !(await askKey(said))) throw error;
    }
  }
}

let asking = null; // one question at a time, whoever needs the key

function askKey(said) {
  asking ??= ask("key-dialog", { said }).then((entered) => {
    asking = null;
    if (entered) key.set(entered.key.trim());
    return Boolean(entered?.key.trim());
  });
  return asking;
}

// ---------------------------------------------------------------- what is shown

/** Show the conversation that the address names, or a new one. */
async function follow() {
  const id = location.hash.slice(1);
  if (id && id === shownNow.id) return;
  shownNow = (id && (await conversations.read(id))) || conversations.create();
  if (id && shownNow.id !== id) history.replaceState(null, "", location.pathname);
  editor = null;
  note("");
  openList(false);
  draw();
  await drawList();
  end.go();
  toComposer();
}

function draw() {
  const { turns: said, title } = shownNow;
  const work = running.get(shownNow.id);
  titleLine.textContent = title;
  document.title = said.length ? `${title} – Gemma` : "Gemma";
  views = said.map((turn, number) => (turn.role === "user" ? saidView(turn, number) : answerView(turn, number)));
  turns.replaceChildren(...views.map((view) => view.element ?? view));
  views.forEach((view, number) => view.update?.(said[number] === work?.turn ? work.progress : null));
  main.classList.toggle("empty", !said.length);
  main.classList.toggle("running", Boolean(work));
  composer.setRunning(Boolean(work));
}

function saidView(turn, number) {
  if (editor?.number === number) return editor.element;
  return saidTurn(turn, { onedit: () => edit(turn, number), onview: view });
}

function answerView(turn, number) {
  const made = new AnswerTurn(turn, { onretry: () => retry(shownNow), note: tell });
  made.element.classList.toggle("last", number === shownNow.turns.length - 1);
  return made;
}

/** Draw the answer that is being written, if it is the one shown; who reads its end stays there. */
function drawAnswer(conversation) {
  const work = running.get(conversation.id);
  if (shownNow !== conversation || !work) return;
  const view = views.at(-1);
  view.soon(work.progress, () => end.keep());
}

function edit(turn, number) {
  if (running.has(shownNow.id)) return;
  const conversation = shownNow;
  const element = make("article", { class: "turn said" }, make("h2", { class: "hidden", text: "You said" }));
  const close = () => {
    editor = null;
    draw();
    turns.children[number].querySelector(".edit").focus();
  };
  const inner = new Composer(element, { send: (said) => say(conversation, said, number), cancel: close, note }, turn);
  editor = { number, element, composer: inner };
  draw();
  inner.focus();
}

async function view(picture) {
  const place = document.getElementById("picture-place");
  place.replaceChildren(shown(picture));
  await ask("picture-dialog", { name: picture.name });
  place.replaceChildren();
}

// ---------------------------------------------------------------- the list

async function drawList() {
  const kept = await conversations.list();
  const focused = document.activeElement?.closest("#list li")?.dataset.id;
  const named = document.activeElement?.className;
  list.replaceChildren(...kept.map(listItem));
  list.hidden = !kept.length;
  if (focused) list.querySelector(`[data-id="${focused}"] .${named.split(" ").at(-1)}`)?.focus();
}

function listItem(conversation) {
  const { id, title } = conversation;
  const current = id === shownNow.id;
  return make(
    "li",
    { "data-id": id, class: current ? "current" : undefined },
    make("a", { href: `#${id}`, class: "open", "aria-current": current ? "page" : undefined, title, text: title }),
    iconButton("edit", `Rename ${title}`, () => rename(id), { class: "quiet rename" }),
    iconButton("bin", `Delete ${title}`, () => remove(id), { class: "quiet remove" }),
  );
}

async function rename(id) {
  const conversation = await conversations.read(id);
  const entered = await ask("rename-dialog", { title: conversation.title });
  if (!entered?.title.trim()) return;
  Object.assign(conversation, { title: entered.title.trim(), named: true });
  await save(conversation);
  if (id === shownNow.id) titleLine.textContent = conversation.title;
  await drawList();
  list.querySelector(`[data-id="${id}"] .rename`)?.focus();
}

async function remove(id) {
  const conversation = await conversations.read(id);
  if (!(await ask("delete-dialog", { title: conversation.title }))) return;
  running.get(id)?.stop.abort();
  await gone(id);
}

async function gone(id) {
  deleted.add(id);
  await conversations.remove(id);
  if (id === shownNow.id) location.hash = "";
  await drawList();
  document.getElementById("new").focus();
}

const deleted = new Set(); // an answer that was on its way writes nothing more

async function save(conversation) {
  if (deleted.has(conversation.id)) return;
  try {
    await conversations.write(conversation);
  } catch (error) {
    note(`This conversation could not be kept in the browser: ${error?.message ?? "no room"}`);
  }
}

// ---------------------------------------------------------------- settings, words to the reader

async function learnModels() {
  served = await models();
  drawModel();
}

function drawModel() {
  const { model } = settings.read();
  const chosen = served.find(({ id }) => id === model) ?? served[0];
  composer.allowPictures(chosen?.capabilities?.pictures ?? true);
  document.getElementById("model-name").textContent = chosen?.id ?? "";
}

async function openSettings() {
  const choice = document.getElementById("model");
  choice.replaceChildren(...served.map(({ id }) => make("option", { value: id, text: id })));
  choice.closest(".field").hidden = served.length < 2;
  const { model, ...others } = settings.read();
  const entered = await ask("settings-dialog", {
    ...others,
    model: served.some(({ id }) => id === model) ? model : served[0]?.id,
    key: key.get(),
  });
  if (!entered) return;
  const { key: secret, ...values } = entered;
  settings.write(values);
  key.set(secret.trim());
  drawModel();
}

/** For screen readers: said once, and gone before somebody searches the page and finds it twice. */
function tell(text) {
  status.textContent = text;
  clearTimeout(told);
  told = setTimeout(() => status.replaceChildren(), 5000);
}

let told = 0;

/** Where the next words are written. On a touch screen this would open the keyboard. */
function toComposer() {
  if (!matchMedia("(pointer: coarse)").matches) composer.focus();
}

/** A line above the composer; an empty text takes it away. */
function note(text) {
  notice.textContent = text;
  notice.hidden = !text;
}

// ---------------------------------------------------------------- buttons, keys, files

const menu = document.getElementById("menu");

function openList(open) {
  if (document.body.classList.contains("listing") === open) return;
  document.body.classList.toggle("listing", open);
  menu.setAttribute("aria-expanded", String(open));
  main.inert = open;
  if (open) document.getElementById("new").focus();
  else menu.focus();
}

latest.addEventListener("click", () => {
  end.go();
  composer.focus();
});
menu.addEventListener("click", () => openList(true));
document.getElementById("shade").addEventListener("click", () => openList(false));
matchMedia("(min-width: 56rem)").addEventListener("change", () => openList(false));
document.getElementById("settings").addEventListener("click", openSettings);
for (const button of document.querySelectorAll(".new")) {
  button.addEventListener("click", () => {
    openList(false);
    if (location.hash) location.hash = "";
    else composer.focus();
  });
}
turns.addEventListener("click", ({ target }) => {
  const button = target.closest(".copy-code");
  if (button) copied(button, button.closest(".code").querySelector("code").textContent, tell);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
  if (document.body.classList.contains("listing")) openList(false);
  else running.get(shownNow.id)?.stop.abort();
});
window.addEventListener("hashchange", follow);

onDrop((files) => {
  const into = editor?.composer ?? composer;
  into.add(files);
  into.focus();
});

const keeps = await conversations.open(async (id) => {
  if (!running.has(id)) {
    conversations.forget(id);
    if (id === shownNow.id && !editor) {
      const written = await conversations.read(id);
      if (written) shownNow = written;
      draw();
    }
  }
  await drawList();
});
shownNow = conversations.create();
draw();
if (location.hash) await follow();
else {
  await drawList();
  toComposer();
}
if (!keeps) note("This browser keeps no conversations: they are gone when the page is closed.");
try {
  await withKey(learnModels);
} catch (error) {
  note(error.message);
}
document.documentElement.dataset.ready = "";
