"""The parts of `gemma_mlx.evaluation`: rows, answers, scores, and how they are shown."""
