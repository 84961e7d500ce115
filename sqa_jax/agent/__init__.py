"""The agent: a small student that may call tools before it answers.

`loop.Agent` runs episodes in one batch of decode slots, `policies` decide whether a tool is called, `tools` holds the
registry of tools (`caption`, `retrieval`), `run.PolicyRunner` keeps each policy's predictions on disk, and `summary`
and `report` compare accuracy and cost.
"""
