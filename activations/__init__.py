"""Activations: text becomes arrays, kept in HDF5."""
