"""Benchmarks: a module a section, timed beside its rivals; ``python -m lab.bench`` runs them."""
