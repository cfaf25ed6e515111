"""Measuring: quality against the teacher, speed against it, and what an attention does on text."""
