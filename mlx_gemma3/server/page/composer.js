// Where a turn is written: words, and pictures by picking, dropping and pasting. The page has one at its foot, and
// one in the place of a turn that is being edited; both are made of the template of index.html.

import { icon } from "./dom.js";
import { ACCEPT, pictureOf, preview } from "./pictures.js";

export class Composer {
  /** handlers: send({text, pictures}), stop(), cancel() for one that edits, note(text). */
  constructor(place, handlers, turn = null) {
    this.handlers = handlers;
    this.pictures = [];
    this.running = false;
    this.form = document.getElementById("composer").content.firstElementChild.cloneNode(true);
    [this.field, this.tray, this.picker] = ["textarea", ".tray", "input[type=file]"].map((part) =>
      this.form.querySelector(part),
    );
    [this.attach, this.cancel, this.send] = [".attach", ".cancel", ".send"].map((part) =>
      this.form.querySelector(part),
    );
    this.picker.accept = ACCEPT;
    this.cancel.hidden = !turn;
    this.#listen();
    place.append(this.form);
    if (turn) {
      this.form.classList.add("editing");
      this.form.setAttribute("aria-label", "Edit this turn");
      this.field.setAttribute("aria-label", "What you said");
      this.field.value = turn.text;
      this.pictures = [...turn.pictures];
    }
    this.#draw();
  }

  #listen() {
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.send.addEventListener("click", (event) => {
      if (!this.running) return;
      event.preventDefault(); // the same button: the focus stays where it is
      if (event.detail < 2) this.handlers.stop(); // the second click of two was meant for sending
    });
    this.field.addEventListener("keydown", (event) => {
      const composing = event.isComposing || event.keyCode === 229; // an input method's Enter takes what it offers
      if (event.key !== "Enter" || event.shiftKey || composing) return;
      event.preventDefault();
      if (!this.running) this.#submit();
    });
    this.field.addEventListener("input", () => this.#draw());
    this.form.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.isComposing || !this.handlers.cancel) return;
      event.stopPropagation();
      this.handlers.cancel();
    });
    this.field.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (!files.length || event.clipboardData.getData("text/plain")) return; // tables are copied as a picture too
      event.preventDefault();
      this.add(files);
    });
    this.attach.addEventListener("click", () => this.picker.click());
    this.picker.addEventListener("change", () => {
      this.add([...this.picker.files]);
      this.picker.value = ""; // so that the same file can be picked again
      this.field.focus();
    });
    this.cancel.addEventListener("click", () => this.handlers.cancel());
  }

  /** Take pictures in; what is none is told. */
  add(files) {
    if (this.attach.hidden) return this.handlers.note("This model reads no pictures.");
    const others = [];
    for (const file of files) {
      const picture = pictureOf(file);
      if (picture) this.pictures.push(picture);
      else others.push(file.name);
    }
    this.handlers.note(others.length ? `Not a picture that can be read: ${others.join(", ")}` : "");
    this.#draw();
  }

  allowPictures(allowed) {
    this.attach.hidden = !allowed;
  }

  /** Whether an answer is being written: then the button stops it. */
  setRunning(running) {
    this.running = running;
    this.#draw();
  }

  clear() {
    this.field.value = "";
    this.pictures = [];
    this.#draw();
  }

  focus() {
    this.field.focus();
    this.field.setSelectionRange(this.field.value.length, this.field.value.length);
  }

  #submit() {
    const said = { text: this.field.value.trim(), pictures: this.pictures };
    if (said.text || said.pictures.length) this.handlers.send(said);
  }

  #draw() {
    const words = this.running ? "Stop" : this.handlers.cancel ? "Answer again" : "Send";
    if (this.send.getAttribute("aria-label") !== words) {
      this.send.setAttribute("aria-label", words);
      this.send.title = words;
      this.send.classList.toggle("stops", this.running);
      this.send.replaceChildren(icon(this.running ? "stop" : "send"));
    }
    const empty = !this.field.value.trim() && !this.pictures.length;
    this.send.setAttribute("aria-disabled", String(empty && !this.running)); // stays in the order of Tab
    this.tray.hidden = !this.pictures.length;
    if ([...this.tray.children].map((tile) => tile.dataset.id).join() !== this.pictures.map(({ id }) => id).join())
      this.#drawTray();
    if (!CSS.supports("field-sizing", "content")) {
      this.field.style.height = "auto";
      this.field.style.height = `${this.field.scrollHeight}px`;
    }
  }

  #drawTray() {
    this.tray.replaceChildren(
      ...this.pictures.map((picture) => {
        const tile = preview(picture, () => {
          this.pictures = this.pictures.filter((other) => other !== picture);
          this.#draw();
          this.field.focus();
        });
        tile.dataset.id = picture.id;
        return tile;
      }),
    );
  }
}
