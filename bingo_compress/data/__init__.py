"""Folders of images, and how they become pixels."""
