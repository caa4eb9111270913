// What is set for all answers to come, kept in the browser.

const NAME = "gemma.settings";
const EMPTY = { model: "", system: "", temperature: "", length: "" };

export function read() {
  try {
    return { ...EMPTY, ...JSON.parse(localStorage.getItem(NAME)) };
  } catch {
    return { ...EMPTY };
  }
}

export function write(values) {
  localStorage.setItem(NAME, JSON.stringify(values));
}
