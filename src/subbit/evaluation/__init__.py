"""Evaluation: what a model, dense or compressed, is worth and how fast it runs."""
