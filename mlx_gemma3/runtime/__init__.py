"""The engine: one thread that writes several answers at once, and conversations. See docs/architecture.md."""
