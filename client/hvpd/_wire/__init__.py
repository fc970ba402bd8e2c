"""The formats that client and server share: codecs, frames, digests, pytrees, and the
vector port's protocol.
"""
