"""What is told: MLflow records, progress on the terminal, the report. MLflow is imported in `tracking` only."""
