"""Launching on a cluster. Standard library and YAML only, so that it runs on a login node without torch."""
