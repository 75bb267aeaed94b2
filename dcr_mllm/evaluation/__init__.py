"""Measuring towers: what a vision tower sees, what it lost, and how sure one can be of either."""
