"""Arrays on disk: manifests, checkpoints' folders, weights."""
