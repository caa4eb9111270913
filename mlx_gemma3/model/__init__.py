"""Arrays in, logits out. Knows nothing of words, files or names.

Reading order: gemma3.py (the whole model), text.py (decoder), vision.py (pictures), then layers.py, masks.py, cache.py.
"""
