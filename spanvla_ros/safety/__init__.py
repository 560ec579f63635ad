"""The safety kernel: plan checks, fallback, guardian and follower, on numpy alone.

It sees no obstacles. What leaves it is *valid* (finite, feasible, continuous, fresh, on the
announced path), which is not the same as safe.
"""
