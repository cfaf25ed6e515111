"""How a stage is done: data, models, swap, losses, training, evaluation. torch and transformers; no ray, no mlflow."""
