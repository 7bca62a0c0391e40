"""The algorithm as pure functions: rewards, advantages, packing, losses."""
