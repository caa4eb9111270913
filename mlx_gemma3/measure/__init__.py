"""Figures of a model: how fast it is here, how far it is from another, what it holds, and where it fits."""
