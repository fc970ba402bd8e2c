"""Messages and service stubs of the wire protocol `hvpd.v1`, generated from proto/ by `make stubs`. Not to be edited."""
