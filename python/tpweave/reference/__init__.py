"""Plain torch and torch.distributed forms of every op: the oracle of the tests and the fallback that always works."""
