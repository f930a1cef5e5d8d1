"""Sampled clips judged: metrics, videos to look at, the report."""
