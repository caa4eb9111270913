"""The parts of `mlx-gemma3 chat`, a file each; ../chat.py puts them together."""
