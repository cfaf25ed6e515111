"""What is told of studies: their answer, MLflow records, what a terminal shows."""
