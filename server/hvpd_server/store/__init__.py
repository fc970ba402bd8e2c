"""The files on disk: blobs, names, owners, quarantine."""
