"""What the trainer must know about a model: its family's inputs."""
