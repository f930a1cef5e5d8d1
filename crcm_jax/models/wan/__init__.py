"""The Wan family: its configuration, its transformer, its published releases."""
