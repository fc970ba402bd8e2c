"""The wire: gRPC services and the vector port, their limits, TLS and rights."""
