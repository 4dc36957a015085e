"""Support for transformers models: the inputs of each family, attention over packed groups, vision towers, and the head."""
