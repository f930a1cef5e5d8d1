"""Images to embeddings."""
