"""From words to words. Reading order: engine.py (the one MLX thread), session.py (one timeline), options.py."""
