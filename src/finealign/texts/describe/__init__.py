"""Class descriptions written by a chat endpoint, checked one by one and against those of other classes."""
