"""From observations to plans: alignment, model backends, the planner and its reasoner."""
