"""Read and write files as a whole, and report faults in them in one line each."""
