// The dialogs of index.html: each is shown, and gives what was entered, or null if it was left.

/** Show a dialog whose form is filled with these values; returns its fields' values, or null. */
export function ask(id, values = {}) {
  const dialog = document.getElementById(id);
  const form = dialog.querySelector("form");
  form.reset();
  for (const [name, value] of Object.entries(values)) {
    const field = form.elements.namedItem(name);
    if (field) field.value = value;
    for (const place of dialog.querySelectorAll(`[data-text="${name}"]`)) place.textContent = value;
  }
  return new Promise((resolve) => {
    let entered = null;
    const listening = new AbortController();
    const { signal } = listening;
    form.addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        entered = Object.fromEntries(new FormData(form));
        dialog.close();
      },
      { signal },
    );
    for (const button of dialog.querySelectorAll("[data-close]"))
      button.addEventListener("click", () => dialog.close(), { signal });
    dialog.addEventListener("click", (event) => event.target === dialog && outside(dialog, event) && dialog.close(), {
      signal,
    });
    dialog.addEventListener(
      "close",
      () => {
        listening.abort();
        resolve(entered);
      },
      { signal },
    );
    dialog.showModal();
  });
}

/** Whether a click was beside the dialog, on what it covers. */
function outside(dialog, { clientX, clientY }) {
  const box = dialog.getBoundingClientRect();
  return clientX < box.left || clientX > box.right || clientY < box.top || clientY > box.bottom;
}
