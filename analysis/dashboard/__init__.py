"""The comparison page beside MLflow's own pages, served by MLflow's server."""
