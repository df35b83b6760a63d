"""Evaluation of ChEX: metrics, tasks, trivial baselines and the HTML report."""
