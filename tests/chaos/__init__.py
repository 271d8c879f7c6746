"""Faults with real processes and real signals: ``python -m tests.chaos`` proves that a sweep survives them."""
