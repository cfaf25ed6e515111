"""What to do: the study file, its plan and the identity of every stage. No torch, no ray, no mlflow here."""
