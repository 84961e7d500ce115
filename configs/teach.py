"""The sample's simulated teacher, replayed: needs no key and no network. For a real teacher set client, model, budget."""

from sqa_jax.config import default


def get_config():
    config = default()
    config.teach.client = "replay"
    config.teach.replay = ("sample",)
    config.teach.model = ""
    return config
