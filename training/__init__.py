"""Training of ChEX: data sets, objectives, the training loop and one script per stage."""
