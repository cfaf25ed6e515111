"""What a terminal shows of a plan and of a run."""
