"""Machines rented on Vast.ai: search and price, rent, watch, destroy. Ray's side of it is `provider`."""
