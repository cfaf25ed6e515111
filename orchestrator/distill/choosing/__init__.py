"""Choosing: which layers are swapped next, by what swapping them costs on text that no report reads."""
