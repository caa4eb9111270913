"""The model: token ids and pixels in, logits out. Knows nothing of words, files or names.

Reading order: gemma3.py (the whole model), text.py (decoder), vision.py (pictures), context.py (what a token may see),
cache.py (KV caches); then runner.py and fused.py, which run it on a device.
"""
