"""Heads that turn a backbone's features into answers."""
