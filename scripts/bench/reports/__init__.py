"""What a run found, in words, as a plot, and beside the recorded run."""
