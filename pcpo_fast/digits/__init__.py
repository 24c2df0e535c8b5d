"""The demo: two small models of handwritten digits, their rewards and prompts, and the command that rebuilds them all.

`diffusion/` and `flow/` are diffusers pipelines, `classifiers/` the weights behind the rewards.
"""
