"""The faces of ChEX: the `chex` command line and the Space."""
