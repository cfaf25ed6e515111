"""Going on position by position: the state of an operator, and how each kind of convolution goes on from it."""
