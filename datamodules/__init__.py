"""Sharded WebDataset tars, read exactly."""
