"""Decides which work runs next, and with which other work. Knows neither devices nor
networks.
"""
