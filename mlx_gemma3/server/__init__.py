"""The engine behind HTTP, and the page that talks to it."""
