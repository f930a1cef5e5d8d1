"""Train steps compiled ahead of time, for devices that are not there."""
