"""The engine as a process of its own: JSON lines in, JSON lines out. See docs/worker.md."""
