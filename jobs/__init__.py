"""What one launches: SLURM scripts, benchmarks and the first run on a GPU."""
