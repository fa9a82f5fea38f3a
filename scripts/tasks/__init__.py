"""One module per task of scripts/bench_tasks.py: its data, its networks and its score."""
