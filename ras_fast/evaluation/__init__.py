"""Safety evaluation: datasets, defences, judges, metrics, and the run that makes the table."""
