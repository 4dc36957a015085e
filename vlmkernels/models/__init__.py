"""What must be known about a model: its family's inputs, and how to cut, join and merge them."""
