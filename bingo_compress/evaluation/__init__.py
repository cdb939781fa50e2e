"""The proof: probes, figures with intervals, the protocol."""
