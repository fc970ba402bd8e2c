"""Python imports this file at the start of the servers that tests start, because its
folder is in their PYTHONPATH.
"""

import hvpd_lock_order

hvpd_lock_order.install()
