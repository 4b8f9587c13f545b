"""nn.Modules whose parameters are split over the ranks of a group."""
