"""Whether an exported file gives the same answers where others run it."""
