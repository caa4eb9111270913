// The conversations that this browser keeps, in its own database (IndexedDB).
//
// A conversation: {id, title, named, created, changed, turns}. A turn of the user: {role: "user", text, pictures}, with
// pictures {id, name, blob}. An answer: {role: "assistant", text, state, …}. Each conversation is one object while the
// page is open: an answer that is written while another conversation is shown goes on in it.

const NAME = "gemma";
const TITLE = 48; // characters

export class Conversations {
  #database = null; // null where the browser allows none: all is kept until the page is closed
  #opened = new Map();
  #stored = new Set(); // ids of pictures that are in the database
  #channel = "BroadcastChannel" in window ? new BroadcastChannel(NAME) : null;

  /** Open the database; false if this browser keeps nothing. `onchange(id)`: another tab wrote a conversation. */
  async open(onchange) {
    this.#channel?.addEventListener("message", ({ data }) => onchange(data));
    try {
      const opening = indexedDB.open(NAME, 1);
      opening.onupgradeneeded = () => {
        opening.result.createObjectStore("titles", { keyPath: "id" });
        opening.result.createObjectStore("turns", { keyPath: "id" });
        opening.result.createObjectStore("pictures", { keyPath: "id" }).createIndex("conversation", "conversation");
      };
      this.#database = await result(opening);
      this.#database.onversionchange = () => this.#database.close();
    } catch {
      return false;
    }
    return true;
  }

  create() {
    const now = Date.now();
    return { id: newId(), title: "New conversation", named: false, created: now, changed: now, turns: [] };
  }

  /** Titles, the latest first. */
  async list() {
    const kept = this.#database
      ? await result(this.#database.transaction("titles").objectStore("titles").getAll())
      : [...this.#opened.values()];
    return kept.sort((a, b) => b.changed - a.changed);
  }

  /** A conversation, or null. */
  async read(id) {
    if (this.#opened.has(id) || !this.#database) return this.#opened.get(id) ?? null;
    const reading = this.#database.transaction(["titles", "turns", "pictures"]);
    const [title, kept, pictures] = await Promise.all([
      result(reading.objectStore("titles").get(id)),
      result(reading.objectStore("turns").get(id)),
      result(reading.objectStore("pictures").index("conversation").getAll(id)),
    ]);
    if (!title || !kept) return null;
    const byId = new Map(pictures.map(({ id, name, blob }) => [id, { id, name, blob }]));
    for (const picture of byId.keys()) this.#stored.add(picture);
    const turns = kept.turns.map((turn) =>
      turn.pictures ? { ...turn, pictures: turn.pictures.map((id) => byId.get(id)) } : turn,
    );
    this.#opened.set(id, { ...title, turns });
    return this.#opened.get(id);
  }

  /** Keep a conversation as it is now. Pictures are written once; those that no turn shows any more are dropped. */
  async write(conversation) {
    this.#opened.set(conversation.id, conversation);
    if (!this.#database) return;
    const { turns, ...title } = conversation;
    const shown = new Map(turns.flatMap((turn) => turn.pictures ?? []).map((picture) => [picture.id, picture]));
    const writing = this.#database.transaction(["titles", "turns", "pictures"], "readwrite");
    writing.objectStore("titles").put(title);
    writing.objectStore("turns").put({
      id: title.id,
      turns: turns.map((turn) => (turn.pictures ? { ...turn, pictures: turn.pictures.map(({ id }) => id) } : turn)),
    });
    const pictures = writing.objectStore("pictures");
    const fresh = [...shown.values()].filter(({ id }) => !this.#stored.has(id));
    for (const picture of fresh) pictures.put({ ...picture, conversation: title.id });
    pictures.index("conversation").getAllKeys(title.id).onsuccess = ({ target }) => {
      for (const id of target.result) if (!shown.has(id)) pictures.delete(id);
    };
    await done(writing);
    for (const { id } of fresh) this.#stored.add(id);
    this.#channel?.postMessage(title.id);
  }

  async remove(id) {
    this.#opened.delete(id);
    if (!this.#database) return;
    const writing = this.#database.transaction(["titles", "turns", "pictures"], "readwrite");
    writing.objectStore("titles").delete(id);
    writing.objectStore("turns").delete(id);
    const pictures = writing.objectStore("pictures");
    pictures.index("conversation").getAllKeys(id).onsuccess = ({ target }) =>
      target.result.forEach((key) => pictures.delete(key));
    await done(writing);
    this.#channel?.postMessage(id);
  }

  /** Read it anew the next time: another tab has written it. */
  forget(id) {
    this.#opened.delete(id);
  }
}

/** The first words of what was asked; the name of its picture where there are none. */
export function titleOf({ text, pictures }) {
  const words = text.trim().replace(/\s+/g, " ");
  if (!words) return pictures[0]?.name ?? "New conversation";
  const characters = [...words];
  if (characters.length <= TITLE) return words;
  const cut = characters.slice(0, TITLE).join("");
  return `${cut.lastIndexOf(" ") > TITLE / 2 ? cut.slice(0, cut.lastIndexOf(" ")) : cut}…`;
}

/** `crypto.randomUUID` is there for https and this machine only. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
}

function done(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}
