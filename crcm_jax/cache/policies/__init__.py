"""What a cache keeps and shows, one policy a file."""
