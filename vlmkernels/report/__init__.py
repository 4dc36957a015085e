"""Pages that show runs, completions and curves; each one HTML file that needs nothing else."""
