"""Segment and branch ids that attention masks understand; plain integers, so that building batches needs no JAX."""

PADDING = 0  # segment of padding: it attends to nothing and nothing attends to it
GLOBAL_SEGMENT = -1  # segment of keys that every token attends to: a trained prefix
PREFIX_LM = -1  # branch of a prefix LM's prompt, whose tokens attend to each other in both directions
