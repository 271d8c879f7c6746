"""Sequence-mixing layers behind one contract. A leaf: imports nothing else of this project."""
