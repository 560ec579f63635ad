"""Training data: shards of labelled scenes and the command that draws them."""
