"""`python -m capture` reaches the same verbs as `pairscope`."""

from pairscope import main

main()
