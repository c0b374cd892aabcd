"""What other libraries are given to run finealign with: a file a library, imported only by those who use it."""
