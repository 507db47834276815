"""A run as Slurm jobs: checked on the login node, written as a script, submitted. Torch-free."""
