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

/** The fields of a request. What is left empty is the server's to choose. */
export function asked({ model, system, temperature, length }, models, messages) {
  const chosen = models.find(({ id }) => id === model) ?? models[0];
  return {
    ...(chosen ? { model: chosen.id } : {}),
    messages: system.trim() ? [{ role: "system", content: system.trim() }, ...messages] : messages,
    ...(temperature === "" ? {} : { temperature: Number(temperature) }),
    ...(length === "" ? {} : { max_completion_tokens: Number(length) }),
  };
}
