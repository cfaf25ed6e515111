"""Long filters: what all share (`base`), implicit, modal and short ones, and fitting modes to any filter."""
