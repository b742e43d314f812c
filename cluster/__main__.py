"""`python -m cluster` reaches the same verbs as `pairscope`."""

from pairscope import main

main()
