"""Nemotron 3 Nano from scratch.  Read in this order: config, model.model, model.mamba, model.moe, train.loop."""
