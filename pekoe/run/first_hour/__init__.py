"""`pekoe doctor --gpu`: what is to be proved in the first hour on a GPU, in a few minutes and without a network.

command.py  runs the parts, each in a process of its own with a limit; the table and the JSON
site.py     what parts share: the device, figures, models of random weights
proofs.py   parts that say whether numbers are right
publish.py  parts about weights on their way, and memory given back
speeds.py   parts that measure: tokens a second, FLOP/s, memory
"""
