"""Floor 3: composition. Each command's loop, made of the rooms below."""
