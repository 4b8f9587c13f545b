"""The `tpweave` command."""
