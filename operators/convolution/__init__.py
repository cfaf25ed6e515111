"""Causal convolutions, gates and projections: what lies below every operator, with gradients."""
