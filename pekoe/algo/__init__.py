"""Floor 1: the algorithm as pure functions. Rewards, advantages, packing, losses; tensors in, tensors out."""
