"""Training data: shards of labeled scenes and the command that draws them."""
