"""Many devices and processes: the mesh, what lies where, who waits for whom."""
