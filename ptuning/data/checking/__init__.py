"""`ptuning data`: what is wrong with a file of rows, how long they are, what to do about it."""
