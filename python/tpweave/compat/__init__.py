"""Other packages' names on tpweave's operations: code written for them runs unchanged."""
