"""The main job: plan, statistics, spectra, factors, output."""
