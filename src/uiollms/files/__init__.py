"""Reading and writing files as a whole, and what is wrong with them in one line."""
