"""Measurements of mmpretrain's models that leave no trace: samples, GBR, attacks."""
