"""Where stages live and who computes them: store, broker, sweep. Ray is imported here only."""
