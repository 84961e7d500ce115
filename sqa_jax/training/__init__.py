"""Training: the loop (`loop.train`) and its parts.

loss, optimizer, step       summed cross-entropy, AdamW with its schedule, the jitted update with gradient accumulation
data, validate              packed training rows and their loader; validation loss and accuracy
checkpoint, restore         the last train state and the best adapter on disk (orbax), and back into their shards
pending, reporter           metrics one step late; metrics.jsonl, TensorBoard and the progress bar
stop, profiler, overview    stopping all processes together; a trace of some steps; the table of parameters
workdir                     a run's directory and its config.json
"""
