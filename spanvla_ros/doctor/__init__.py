"""What is missing or mis-set on a machine, in a recorded drive, on a running graph."""
