"""Backbone, tasks, the one training loop, cost meters, run records and their mirror in MLflow."""
