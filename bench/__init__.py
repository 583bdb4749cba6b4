"""The benchmark: what a call through the gateway costs, against its peers and against another commit.

It knows the product from outside only (its commands, HTTP contract and processes), so that one and the same
benchmark can measure any commit. `make bench`; see README.md here.
"""
