"""Agents: sessions that record every turn as it is sampled, and the episodes that use them."""
