"""Benchmarks: one module for each section, run by ``python -m lab.bench``."""
