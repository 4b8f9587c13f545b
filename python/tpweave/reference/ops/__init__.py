"""References of `tpweave.ops`, one module per stem."""
