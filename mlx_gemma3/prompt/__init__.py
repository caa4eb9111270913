"""Words and pictures to token ids and pixels, and ids back to words. NumPy only: knows nothing of MLX."""
