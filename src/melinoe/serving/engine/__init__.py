"""The two ways of computing answers, and what belongs to one request in them."""
