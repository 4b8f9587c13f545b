"""Operations of one rank: per stem a table of backends, autograd, and a torch.library registration."""
