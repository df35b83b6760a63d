"""Metrics: each folder holds one `evaluate.Metric` with the pure numpy function behind it."""
