"""One page that shows what the numbers mean: a picture, a question, and what a checkpoint makes of them."""
