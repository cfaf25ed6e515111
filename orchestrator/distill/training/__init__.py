"""Training: losses, optimizers, the loop over steps, and what it writes on the way."""
