"""Devices: the mesh, and where on it every parameter lies."""
