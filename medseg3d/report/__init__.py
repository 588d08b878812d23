"""What a user looks at after a run: statistics, a preview picture, an evaluation, a record of the run."""
