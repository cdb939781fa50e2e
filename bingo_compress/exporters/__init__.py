"""The student as files for a device, each ending in a check against torch."""
