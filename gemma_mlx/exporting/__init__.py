"""A trained model in the forms that other programs read: Hugging Face, PEFT, mlx-lm and mlx-vlm, GGUF."""
