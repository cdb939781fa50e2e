"""The plan, the losses and the loop."""
