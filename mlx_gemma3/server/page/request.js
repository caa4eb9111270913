// What is sent for an answer: the turns of a conversation as messages, and the settings.

import { contentOf } from "./pictures.js";

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

/** Turns as messages. An answer that never came is left out, and what was said around it joined. */
export async function messagesOf(said) {
  const messages = [];
  for (const turn of said) {
    if (turn.role === "assistant" && !turn.text) continue;
    const content = turn.role === "user" ? await contentOf(turn) : turn.text;
    const last = messages.at(-1);
    if (last?.role === turn.role) last.content = [...items(last.content), ...items(content)];
    else messages.push({ role: turn.role, content });
  }
  return messages;
}

function items(content) {
  return typeof content === "string" ? [{ type: "text", text: content }] : content;
}
