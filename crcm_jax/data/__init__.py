"""Clips and prompts: sources, sets of latents on disk, and the pipeline that feeds a run."""
