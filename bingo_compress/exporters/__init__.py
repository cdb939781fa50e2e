"""Formats a student is exported to: one file each, each ending in a parity check."""
