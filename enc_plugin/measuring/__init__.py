"""Measurements of mmpretrain models without side effects: samples, GBR, attacks."""
