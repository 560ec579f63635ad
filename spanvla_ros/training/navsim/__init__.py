"""NAVSIM's logs and metric caches, read offline into scenes and samples."""
