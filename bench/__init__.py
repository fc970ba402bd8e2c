"""The figures that hvpd promises, measured: `python -m bench NAME`. README.md says what each is, and what was expected of it."""
