// Files that are dragged over the page: it says so while they are, and takes those that are dropped.

export function onDrop(take) {
  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  const show = (over) => document.body.classList.toggle("dropping", over);
  window.addEventListener("dragenter", (event) => carriesFiles(event) && show(true));
  window.addEventListener("dragleave", (event) => event.relatedTarget === null && show(false));
  window.addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
  window.addEventListener("drop", (event) => {
    show(false);
    if (!carriesFiles(event)) return;
    event.preventDefault(); // the browser would open them
    take([...event.dataTransfer.files]);
  });
}
