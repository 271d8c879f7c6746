"""Benchmarks: time, memory and bytes of implementations, measured next to each other in one run."""
