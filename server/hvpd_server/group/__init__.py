"""Groups: several processes, called ranks, that compute as one server.

Rank 0, the leader, decides everything, and numbers each action on the devices. The
other ranks execute these orders in the same sequence. A group fails as a whole.
"""
