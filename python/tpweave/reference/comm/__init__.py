"""References of `tpweave.comm`, one module per stem."""
