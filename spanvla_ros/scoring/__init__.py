"""PDMS (NAVSIM v1.1) and EPDMS (NAVSIM v2.2) of planned trajectories, equal to the official ones."""
