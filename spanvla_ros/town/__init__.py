"""A small procedural driving world: roads, traffic, a reference driver, and its pictures."""
