"""Figures of a model: how fast it is here (benchmark, roofline), and how far it is from another (evaluate, scores)."""
