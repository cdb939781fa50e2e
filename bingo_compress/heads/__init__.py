"""Class heads that go into an exported file: fitted, calibrated, written into the graph and proven."""
