"""Store -> MLflow, beside a run."""
