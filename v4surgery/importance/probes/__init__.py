"""What is measured in a block while a prompt runs through it, one file for each part of a block.

A probe hangs forward hooks on a block for the time of one prompt, and adds sums over the prompt's
tokens to totals. It keeps what it derives from weights (column norms, Gram matrices) from prompt
to prompt; it lives as long as its block is in memory.
"""
