"""The tasks of the evaluation: catalogue, targets, inference procedures, post-processing, examples."""
