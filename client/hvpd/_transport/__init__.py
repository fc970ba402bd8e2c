"""The connection to a server: calls, retries, streams, the vector port."""
