// How the turns of a conversation look: what was said, and answers while and after they are written.

import { copy, icon, iconButton, make } from "./dom.js";
import { Rendering } from "./markdown.js";
import { shown } from "./pictures.js";

const STAGES = {
  reading: (done, total) => `Reading the prompt: ${count(done)} of ${count(total)} tokens`,
  pictures: (done, total) =>
    `Looking at the ${total === 1 ? "picture" : "pictures"}: ${count(done)} of ${count(total)}`,
};
const ENDS = { stopped: "Stopped", length: "Ended at the longest length", writing: "Interrupted" };

/** What was said. `onedit()` and `onview(picture)` are its buttons. */
export function saidTurn(turn, { onedit, onview }) {
  const pictures = turn.pictures.map((picture) =>
    make(
      "li",
      {},
      make(
        "button",
        { type: "button", class: "view", "aria-label": `Show ${picture.name} large`, onclick: () => onview(picture) },
        shown(picture),
      ),
    ),
  );
  return make(
    "article",
    { class: "turn said" },
    make("h2", { class: "hidden", text: "You said" }),
    ...(pictures.length ? [make("ul", { class: "pictures", "aria-label": "Pictures" }, ...pictures)] : []),
    make(
      "div",
      { class: "line" },
      make("div", { class: "actions" }, iconButton("edit", "Edit this turn", onedit, { class: "quiet edit" })),
      ...(turn.text ? [make("p", { class: "words", text: turn.text })] : []),
    ),
  );
}

/** An answer; `update` draws what has changed of its turn. */
export class AnswerTurn {
  #frame = 0;

  constructor(turn, { onretry, note }) {
    this.turn = turn;
    this.progress = make("div", { class: "progress" });
    this.thought = make("p", {});
    this.thinking = make("summary", {});
    this.thoughts = make("details", { class: "thoughts" }, this.thinking, this.thought);
    this.text = make("div", { class: "markdown" });
    this.error = make("div", { class: "error" });
    this.meta = make("span", { class: "meta" });
    const copying = iconButton("copy", "Copy this answer", () => copied(copying, turn.text, note), {
      class: "quiet copy",
    });
    this.actions = make(
      "div",
      { class: "actions" },
      copying,
      iconButton("retry", "Answer again", onretry, { class: "quiet retry" }),
      this.meta,
    );
    this.again = make("button", { type: "button", class: "button", text: "Try again", onclick: onretry });
    this.element = make(
      "article",
      { class: "turn answer" },
      make("h2", { class: "hidden", text: "Answer" }),
      this.progress,
      this.thoughts,
      this.text,
      this.error,
      this.actions,
    );
    this.rendering = new Rendering(this.text);
  }

  /** Draw at the next frame: tokens may come faster than frames. `after` is called when it is drawn. */
  soon(running, after) {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.update(running);
      after();
    });
  }

  /** running: {stage, done, total} of an answer that is being written, null of one that is not. */
  update(running) {
    if (this.#frame) cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const { text, thoughts = "", state, error, rate } = this.turn;
    this.element.classList.toggle("writing", Boolean(running));
    this.element.setAttribute("aria-busy", String(Boolean(running)));
    this.rendering.update(text, Boolean(running));
    this.#drawThoughts(thoughts, Boolean(running) && !text);
    this.#drawProgress(running && !text && !thoughts ? running : null);
    this.error.hidden = !error;
    if (error && !this.error.childElementCount)
      this.error.append(icon("warning"), make("p", { text: error }), this.again);
    if (!error) this.error.replaceChildren();
    const end = running || error ? null : ENDS[state];
    this.meta.textContent = [end, rate && `${rate.toFixed(rate < 10 ? 1 : 0)} tokens/s`].filter(Boolean).join(" · ");
    this.actions.hidden = Boolean(running) || (Boolean(error) && !text);
    this.actions.querySelector(".copy").hidden = !text;
    this.actions.querySelector(".retry").hidden = Boolean(error);
  }

  /** What a model thinks before it answers: its length while it does, all of it for who opens it. */
  #drawThoughts(thoughts, thinking) {
    this.thoughts.hidden = !thoughts;
    this.thinking.textContent = thinking ? `Thinking: ${count(thoughts.length)} characters` : "What it thought";
    this.thought.textContent = thoughts.trim();
  }

  #drawProgress(running) {
    this.progress.hidden = !running;
    if (!running) return this.progress.replaceChildren();
    if (!this.progress.childElementCount) {
      this.progress.append(make("progress", { "aria-label": "How far the prompt is read" }), make("span", {}));
    }
    const [bar, words] = this.progress.children;
    const stage = STAGES[running.stage];
    words.textContent = stage ? stage(running.done, running.total) : "Waiting for the model";
    if (stage) Object.assign(bar, { max: running.total || 1, value: running.done });
    else bar.removeAttribute("value");
    return undefined;
  }
}

/** Copy, and say so for a moment on the button. */
export async function copied(button, text, note) {
  try {
    await copy(text);
  } catch {
    note("The browser did not allow copying.");
    return;
  }
  const used = button.querySelector("use");
  used.setAttribute("href", "#icon-done");
  note("Copied");
  setTimeout(() => used.setAttribute("href", "#icon-copy"), 1500);
}

function count(number) {
  return number.toLocaleString("en");
}
