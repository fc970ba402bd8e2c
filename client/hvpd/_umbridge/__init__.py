"""Serves objectives by UM-Bridge, an HTTP protocol for models in uncertainty
quantification. `model` computes, `requests` reads requests, `http_server` has the
endpoints, `segments` is the shared memory.

Source: https://um-bridge-benchmarks.readthedocs.io, protocol version 1.0.
"""
