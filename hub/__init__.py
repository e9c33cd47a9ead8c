"""Files as the world publishes them: weights, configurations, tokenizers, samples."""
