"""Token ids in, token ids out. Knows nothing of text.

Reading order: loop.py (read the prompt, then one token after another), sampling.py (logits to a token).
"""
