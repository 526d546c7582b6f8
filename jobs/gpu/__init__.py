"""The first run on a GPU: does it work, then how fast; ``first_run.sh`` runs the parts."""
