"""Student models in Flax Linen: decoder-only transformers of several families, T5, and vision-language models.

`api.StudentModel` and `student_config.StudentConfig` are what every model and configuration offers; `catalogue` names
published ones, `params` has the table of parameters. `layers` are the building blocks, `vision` the image encoders.
"""
