"""Kernels for Hopper's sparse tensor cores, in Pallas Mosaic GPU.

Nothing here is imported before it is asked for: older JAX lacks what these modules need.
"""
