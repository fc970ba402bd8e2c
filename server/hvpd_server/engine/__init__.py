"""The server without its network: objectives, points, products."""
