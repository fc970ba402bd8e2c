"""Measures the figures that hvpd promises: `python -m bench NAME`.

README.md says what each figure is, with its prediction.
"""
