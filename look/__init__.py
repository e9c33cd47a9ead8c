"""One page that shows what the numbers mean: a picture, a question, what a model makes of them."""
