"""Prefill, sampling and the decode loop of several sequences at once. Knows nothing of text.

Reading order: prefill.py (read a prompt in chunks), sampling.py and choice.py (logits to a token), batch.py (one token
after another).
"""
