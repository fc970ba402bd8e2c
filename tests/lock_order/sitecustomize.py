"""Python imports this file at the start of the servers that tests start, because its
folder is in their PYTHONPATH.
"""

import os

import hvpd_lock_order

hvpd_lock_order.install()
os.fsync = lambda descriptor: None  # Power cannot fail here, and each registration waits for 14 of them.
