"""Losses: pure functions in the paper's symbols."""
