"""Does it learn? Runs of the pretraining job, described by files: ``python -m experiments``."""
