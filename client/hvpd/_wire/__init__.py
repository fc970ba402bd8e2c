"""The formats that client and server share: codecs, frames, digests, pytrees."""
