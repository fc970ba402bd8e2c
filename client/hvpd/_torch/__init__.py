"""What `hvpd.torch` is made of: checks of a module, and the operator for curvlinops."""
