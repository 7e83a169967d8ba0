"""Benchmarks: one command each, side by side with the alternative in the same run, results with their provenance."""
