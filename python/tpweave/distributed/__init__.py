"""Groups of ranks: topology, transports, symmetric memory, timeouts."""
