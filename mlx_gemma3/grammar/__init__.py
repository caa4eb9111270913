"""What an answer may consist of: schemas, regular expressions, grammars and tools as constraints on tokens.

The work is done by llguidance (the extra `grammar`), which is imported when the first such answer is asked for.
Knows nothing of MLX.
"""
