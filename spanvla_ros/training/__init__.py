"""Training: data, stages, evaluation. The only part of the package with torch besides export."""
