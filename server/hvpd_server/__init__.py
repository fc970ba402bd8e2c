"""The server of hvpd: owns the device, keeps programs warm and points resident, answers products. See `_app` for the whole."""
