"""The predictions and goals of `bench peers`, written before the first measurement."""

from collections.abc import Mapping

from bench._report import Goal

GOALS = {"6 k": Goal(">=", 3.0), "270 k": Goal(">=", 2.0), "1.9 M": Goal(">=", 1.0)}
"""Products of hvpd over those of each peer."""

PREDICTED: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "6 k": {
        "own_grpc": (1.8, 1.5),
        "um_bridge": (20.0, 25.0),
        "tesseract": (12.0, 14.0),
        "triton": (4.0, 2.0),
        "ray_serve": (6.5, 3.5),
        "bento": (10.0, 5.0),
        "curvlinops": (4.0, 1.0),
        "bare_grpc": (1.3, 1.5),
        "echo": (0.5, 0.35),
        "in_process": (0.85, 0.8),
    },
    "270 k": {
        "own_grpc": (1.3, 1.2),
        "um_bridge": (200.0, 150.0),
        "tesseract": (10.0, 10.0),
        "triton": (2.0, 1.5),
        "ray_serve": (2.5, 2.0),
        "bento": (3.0, 2.5),
        "curvlinops": (1.2, 1.0),
        "bare_grpc": (1.2, 1.2),
        "echo": (0.35, 0.3),
        "in_process": (0.85, 0.9),
    },
    "1.9 M": {
        "own_grpc": (1.3, 1.2),
        "um_bridge": (280.0, 250.0),
        "tesseract": (15.0, 12.0),
        "triton": (3.0, 2.0),
        "ray_serve": (3.0, 2.5),
        "bento": (3.5, 3.0),
        "curvlinops": (1.2, 0.9),
        "bare_grpc": (1.4, 1.3),
        "echo": (0.4, 0.35),
        "in_process": (0.75, 0.85),
    },
}
"""Products of hvpd over those of each contender, with 1 and with 16 callers.

A product of hvpd takes 0.6, 4 and 19 ms. UM-Bridge sends x and v as JSON, some 20
characters a number, at 1 microsecond a number. Tesseract sends both in base64, and
checks them with pydantic. Triton, Ray Serve and BentoML hand a vector from the process
that listens to the process that computes, which takes 2 to 5 ms, and at 1.9 M several
copies; they make blocks of 16 callers' vectors. curvlinops has PyTorch's overhead of
some 2 ms for one vector, and as much for a block.
"""
