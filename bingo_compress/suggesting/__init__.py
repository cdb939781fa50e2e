"""The student for a budget: what timm has for the edge, timed here or on the device, best first."""
