"""The training data pipeline, from a configuration to batches of packed rows.

config_data     what a configuration names: `load_config_problems`, `config_records`, `encoder_for`
training_rows   tokenized rows, by a recipe or from traces: `row_source`
dataset         datasets on disk, by fingerprint: `build_or_reuse`, `DistillationDataset`
packing         bin packing of sequences into rows: `plan_rows`, `pack_row`
images          image inputs of rows: `ImageBatcher`
loader          packed rows and batches by number: `PackedRows`, `pack_dataset`, `make_loader`
batch           the arrays of packed rows: `Batch`
"""
