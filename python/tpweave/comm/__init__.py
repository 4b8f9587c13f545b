"""Operations of several ranks: per stem a table of backends, autograd, and a torch.library registration."""
