"""Krylov runs: bases of Krylov spaces that stay on the server between the requests of
their clients. Their products queue in the engine like all products.
"""
