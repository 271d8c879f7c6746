"""Records to tables, statistics, figures and the dashboard. Imports neither torch nor mixers."""
