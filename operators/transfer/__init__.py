"""What an operator inherits from the attention it replaces."""
