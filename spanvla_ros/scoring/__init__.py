"""PDMS (NAVSIM v1.1) and EPDMS (v2.2) of planned trajectories, equal to the official ones."""
