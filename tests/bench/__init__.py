"""The benchmark: xmppd, two of its peers and a bare relay under the same load, in turn. See `__main__`."""
