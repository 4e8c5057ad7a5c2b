"""The bug bundle: the failing piece of a network, as small as it gets, in a folder that runs by itself."""
