"""Derives every program that the server runs from one imported objective: gradients,
products, factors.

`objective` traces what the importer read, `programs` differentiates it. Needs jax;
knows no device, no queue and no store.
"""
