"""Other trainers and libraries, with this package's ops beneath them. Each is imported by its own name."""
