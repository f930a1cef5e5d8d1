"""Networks, codecs and encoders, and the interface between them and everything else."""
