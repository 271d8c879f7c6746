"""Sweep files, the plan they expand to, and the driver and workers that run it."""
