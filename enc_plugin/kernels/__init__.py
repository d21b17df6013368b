"""Effective weights of many layers in few launches: by Triton on CUDA devices, else by torch alone."""
