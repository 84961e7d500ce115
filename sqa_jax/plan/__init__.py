"""What a training run would take on a TPU slice, without the slice: compiled ahead of time, then counted."""
