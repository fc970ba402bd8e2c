"""From one imported objective to every program that the server runs: gradients, products, factors.

`objective` traces what the importer read, `programs` differentiates it. Needs jax; knows no device, no queue and no store.
"""
