"""How a cache packs keys and values, one storage a file."""
