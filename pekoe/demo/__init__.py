"""`pekoe demo`: a small model from nothing to a reasoner, by the code that recipes run."""
