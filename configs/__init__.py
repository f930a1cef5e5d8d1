"""Configurations that come with the program, each a Python file with `get_config(variant)`."""
