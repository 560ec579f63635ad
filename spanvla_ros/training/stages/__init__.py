"""One readable file a stage."""
