"""Where the files are that tests read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "mlx_gemma3" / "demo" / "chat_template.json"  # writes Gemma 3's own turns
PICTURES = ROOT / "examples" / "pictures"
